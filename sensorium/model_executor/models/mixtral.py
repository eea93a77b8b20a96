"""Mixtral: Mistral with a mixture of experts instead of the MLP.

Paper: Jiang et al. 2024, "Mixtral of Experts", section 2. Reference: `transformers` `MixtralForCausalLM`. Text only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from sensorium.config import EngineConfig
from sensorium.model_executor.layers.activation import get_act_and_mul_fn
from sensorium.model_executor.layers.decoder import DecoderOptions
from sensorium.model_executor.layers.mixture_of_experts import Experts, MixtureOfExperts, Routing
from sensorium.model_executor.models.llama import LlamaForCausalLM
from sensorium.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def make_mlp(config: EngineConfig, _layer: int, prefix: str) -> nn.Module:
    """The experts of a layer."""
    text = config.model_config.hf_text_config
    experts = Experts(
        *(text.num_local_experts, text.hidden_size, text.intermediate_size, get_act_and_mul_fn(text.hidden_act)),
        quant_config=config.quant_config,
        prefix=f"{prefix}.experts",
    )
    return MixtureOfExperts(experts, Routing(text.num_experts_per_tok), text.hidden_size, prefix=prefix)


class MixtralForCausalLM(LlamaForCausalLM):
    """A decoder and its output head."""

    names = WeightsMapper(
        orig_to_new_substr={
            ".block_sparse_moe.": ".mlp.",
            ".w1.": ".gate_proj.",
            ".w2.": ".down_proj.",
            ".w3.": ".up_proj.",
        }
    )
    """The names of the model hub's checkpoints; `transformers` saves other names."""

    @staticmethod
    def decoder_options(_text_config: PretrainedConfig) -> DecoderOptions:
        """No biases."""
        return DecoderOptions(make_mlp=make_mlp)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill the parameters."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.names)
