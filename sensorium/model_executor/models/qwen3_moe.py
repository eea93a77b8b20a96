"""Qwen3-MoE: Qwen3 with a mixture of experts instead of the MLP, in most layers or all.

Paper: Qwen team 2025, "Qwen3 Technical Report", section 2. Reference: `transformers` `Qwen3MoeForCausalLM`. Text only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from sensorium.config import EngineConfig
from sensorium.model_executor.layers.activation import get_act_and_mul_fn
from sensorium.model_executor.layers.decoder import DecoderOptions, mlp_of
from sensorium.model_executor.layers.mixture_of_experts import Experts, MixtureOfExperts, Routing
from sensorium.model_executor.models.qwen3 import Qwen3ForCausalLM

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def make_mlp(config: EngineConfig, layer: int, prefix: str) -> nn.Module:
    """A layer's experts; an MLP in layers that `mlp_only_layers` lists, or that `decoder_sparse_step` skips."""
    text = config.model_config.hf_text_config
    if layer in text.mlp_only_layers or not text.num_experts or (layer + 1) % text.decoder_sparse_step:
        return mlp_of(config, prefix)
    experts = Experts(
        *(text.num_experts, text.hidden_size, text.moe_intermediate_size, get_act_and_mul_fn(text.hidden_act)),
        quant_config=config.quant_config,
        prefix=f"{prefix}.experts",
    )
    # Qwen3-VL-MoE has no such setting: its weights are always normalized.
    routing = Routing(text.num_experts_per_tok, is_normalized=bool(getattr(text, "norm_topk_prob", True)))
    return MixtureOfExperts(experts, routing, text.hidden_size, prefix=prefix)


class Qwen3MoeForCausalLM(Qwen3ForCausalLM):
    """A decoder and its output head."""

    @staticmethod
    def decoder_options(text_config: PretrainedConfig) -> DecoderOptions:
        """Qwen3's, with experts."""
        return replace(Qwen3ForCausalLM.decoder_options(text_config), make_mlp=make_mlp)
