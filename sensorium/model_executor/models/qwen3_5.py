"""Qwen3.5: of four layers, three have a gated delta rule with a state of fixed size, and the fourth has attention.

Reference: `transformers` `Qwen3_5ForCausalLM`. Text only. Its attention differs from Llama's: queries and keys are
normed per head, a quarter of their channels is rotated, and a gate that is projected with each query head scales the
head's output. Norms have zero-centered weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from sensorium.model_executor.layers.decoder import DecoderOptions
from sensorium.model_executor.layers.gated_delta_net import GatedDeltaNet
from sensorium.model_executor.layers.layernorm import ZeroCenteredRMSNorm
from sensorium.model_executor.models.llama import LlamaForCausalLM
from sensorium.model_executor.models.utils import AutoWeightsLoader

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Qwen3_5ForCausalLM(LlamaForCausalLM):  # noqa: N801 -- the architecture's name
    """The decoder and its output head. Weights of a head that predicts further tokens (`mtp`) are not used."""

    @staticmethod
    def decoder_options(text_config: PretrainedConfig) -> DecoderOptions:
        """Gated attention, and the delta rule in the other layers."""
        bias = bool(text_config.attention_bias)
        return DecoderOptions(
            qkv_bias=bias,
            output_bias=bias,
            qk_norm=True,
            output_gate=True,
            norm=ZeroCenteredRMSNorm,
            mixers={"linear_attention": ("linear_attn", GatedDeltaNet)},
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill the parameters. If the head is tied to the embeddings, a checkpoint may have either or both."""
        return AutoWeightsLoader(self, skip_prefixes=("mtp.",)).load_weights(weights)
