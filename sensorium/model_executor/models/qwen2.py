"""Qwen2 and Qwen2.5: Llama's decoder with biases on the query, key and value projections.

Paper: Qwen team 2024, "Qwen2 Technical Report". Reference: `transformers` `Qwen2ForCausalLM`. Text only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sensorium.model_executor.layers.decoder import DecoderOptions
from sensorium.model_executor.models.llama import LlamaForCausalLM

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Qwen2ForCausalLM(LlamaForCausalLM):
    """A decoder and its output head. In Qwen2-VL it takes M-RoPE positions `(3, num_tokens)`."""

    @staticmethod
    def decoder_options(_text_config: PretrainedConfig) -> DecoderOptions:
        """Biases on queries, keys and values."""
        return DecoderOptions(qkv_bias=True)
