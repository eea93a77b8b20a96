"""Qwen3: Llama's decoder with a norm over each head of queries and keys.

Paper: Qwen team 2025, "Qwen3 Technical Report", section 2. Reference: `transformers` `Qwen3ForCausalLM`. Text only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sensorium.model_executor.layers.decoder import DecoderOptions
from sensorium.model_executor.models.llama import LlamaForCausalLM

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Qwen3ForCausalLM(LlamaForCausalLM):
    """A decoder and its output head."""

    @staticmethod
    def decoder_options(text_config: PretrainedConfig) -> DecoderOptions:
        """Normed queries and keys; biases if the config has them."""
        bias = bool(text_config.attention_bias)
        return DecoderOptions(qkv_bias=bias, output_bias=bias, qk_norm=True)
