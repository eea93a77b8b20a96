"""GPT-OSS: experts with biases and a clamped gate, a learned attention sink for each head, a window in every other
layer.

Paper: OpenAI 2025, "gpt-oss-120b & gpt-oss-20b Model Card", section 2. Reference: `transformers` `GptOssForCausalLM`.
Text only. The reference's softmax is over the chosen experts' logits only, which equals the normalized softmax over
all. Experts in MXFP4 are dequantized to the model's dtype at load.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from sensorium.config import EngineConfig
from sensorium.model_executor.layers.activation import ClampedSwigluAndMul
from sensorium.model_executor.layers.decoder import DecoderOptions
from sensorium.model_executor.layers.layernorm import WideRMSNorm
from sensorium.model_executor.layers.mixture_of_experts import Experts, MixtureOfExperts, Routing
from sensorium.model_executor.models.llama import LlamaForCausalLM
from sensorium.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def make_mlp(config: EngineConfig, _layer: int, prefix: str) -> nn.Module:
    """A layer's experts. In checkpoints their weights are transposed, and gate and up alternate."""
    text = config.model_config.hf_text_config
    # In older versions of transformers both are constants.
    act_fn = ClampedSwigluAndMul(getattr(text, "swiglu_alpha", 1.702), getattr(text, "swiglu_limit", 7.0))
    experts = Experts(
        *(text.num_local_experts, text.hidden_size, text.intermediate_size, act_fn),
        bias=True,
        quant_config=config.quant_config,
        prefix=f"{prefix}.experts",
        is_transposed=True,
        is_interleaved=True,
    )
    return MixtureOfExperts(
        experts, Routing(text.num_experts_per_tok), text.hidden_size, router_bias=True, prefix=prefix
    )


class GptOssForCausalLM(LlamaForCausalLM):
    """A decoder and its output head."""

    names = WeightsMapper(orig_to_new_substr={".mlp.router.": ".mlp.gate."})

    @staticmethod
    def decoder_options(text_config: PretrainedConfig) -> DecoderOptions:
        """Its differences from Llama."""
        bias = bool(text_config.attention_bias)
        return DecoderOptions(qkv_bias=bias, output_bias=bias, sinks=True, norm=WideRMSNorm, make_mlp=make_mlp)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill the parameters."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.names)
