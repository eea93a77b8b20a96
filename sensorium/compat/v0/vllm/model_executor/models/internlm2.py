"""InternLM 2, with V0's constructor: Llama under other names, and with queries, keys and values fused group by group.

Paper: Cai et al. 2024, "InternLM2 Technical Report", section 2.2. A key/value head and its `G` query heads stand
together in `wqkv`: `[q_1 .. q_G | k | v]` for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from sensorium.compat.v0.text_models import TextDecoder, TextModel
from sensorium.model_executor.layers.decoder import DecoderOptions, head_size_of
from sensorium.model_executor.models.llama import LlamaForCausalLM
from sensorium.model_executor.models.weights import WeightsMapper

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["InternLM2ForCausalLM", "InternLM2Model"]

NAMES = WeightsMapper(
    orig_to_new_substr={
        "tok_embeddings.": "embed_tokens.",
        ".attention.wo.": ".self_attn.o_proj.",
        ".attention.wqkv.": ".self_attn.wqkv.",
        ".feed_forward.w1.": ".mlp.gate_proj.",
        ".feed_forward.w3.": ".mlp.up_proj.",
        ".feed_forward.w2.": ".mlp.down_proj.",
        ".attention_norm.": ".input_layernorm.",
        ".ffn_norm.": ".post_attention_layernorm.",
        "rotary_emb.inv_freq": None,
    },
    orig_to_new_prefix={"output.": "lm_head."},
)


def renamed(
    weights: Iterable[tuple[str, torch.Tensor]], config: PretrainedConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights under Llama's names, queries, keys and values apart."""
    num_kv_heads = config.num_key_value_heads
    num_queries = config.num_attention_heads // num_kv_heads
    for name, tensor in NAMES.apply(weights):
        if ".wqkv." not in name:
            yield name, tensor
            continue
        groups = tensor.view(num_kv_heads, num_queries + 2, head_size_of(config), *tensor.shape[1:])
        for part, heads in zip("qkv", torch.split(groups, [num_queries, 1, 1], dim=1), strict=True):
            yield name.replace("wqkv", f"{part}_proj"), heads.reshape(-1, *tensor.shape[1:])


class Registered(LlamaForCausalLM):
    """The model by Sensorium's constructor."""

    @staticmethod
    def decoder_options(text_config: PretrainedConfig) -> DecoderOptions:
        """One setting for the biases of attention."""
        return DecoderOptions(qkv_bias=text_config.bias, output_bias=text_config.bias)


class InternLM2Model(TextDecoder):
    """The decoder."""

    model_class = Registered

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill the parameters."""
        return super().load_weights(renamed(weights, self.config))


class InternLM2ForCausalLM(TextModel, Registered):
    """The decoder, and its output head."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill the parameters."""
        return super().load_weights(renamed(weights, self.config))
