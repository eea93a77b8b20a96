"""Persimmon, the decoder of Fuyu, with V0's constructors: layer norms, biases, and partly rotated heads.

Source: Elsen et al. 2023, "Releasing Persimmon-8B". Reference: `transformers` `PersimmonForCausalLM`. Checkpoints have
a head's query, key and value channels together: `[q_1 | k_1 | v_1 | q_2 | ...]`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sensorium.attention import Attention, AttentionMetadata, LayerCache
from sensorium.compat.v0.layer_norm_models import EmbeddedDecoder, HeadedModel
from sensorium.config import EngineConfig
from sensorium.kernels import Rotation
from sensorium.model_executor.layers.activation import get_act_fn
from sensorium.model_executor.layers.decoder import rope_of
from sensorium.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from sensorium.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sensorium.model_executor.model_loader.weight_utils import load_parameter
from sensorium.model_executor.weight_tracking import ignore_weight

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["PersimmonForCausalLM", "PersimmonModel"]


class PersimmonAttention(nn.Module):
    """Self-attention with rotary positions over the paged cache."""

    def __init__(self, config: PretrainedConfig, engine_config: EngineConfig, prefix: str) -> None:
        super().__init__()
        width, heads, quant = config.hidden_size, config.num_attention_heads, engine_config.quant_config
        self.query_key_value = QKVParallelLinear(
            width, width // heads, heads, quant_config=quant, prefix=f"{prefix}.query_key_value"
        )
        self.dense = RowParallelLinear(width, width, quant_config=quant, prefix=f"{prefix}.dense")
        head_size = self.query_key_value.head_size
        self.q_layernorm = self.k_layernorm = None
        if config.qk_layernorm:
            self.q_layernorm = nn.LayerNorm(head_size, eps=config.layer_norm_eps)
            self.k_layernorm = nn.LayerNorm(head_size, eps=config.layer_norm_eps)
        self.attn = Attention(
            self.query_key_value.num_heads,
            head_size,
            head_size**-0.5,
            cache_config=engine_config.cache_config,
            prefix=f"{prefix}.attn",
        )

    def forward(
        self, rotation: Rotation, hidden_states: torch.Tensor, kv_cache: Any, attn_metadata: AttentionMetadata
    ) -> torch.Tensor:
        """`(num_tokens, width)` to the same."""
        query, key, value = self.query_key_value.split_heads(self.query_key_value(hidden_states)[0])
        if self.q_layernorm is not None and self.k_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        attended = self.attn(query, key, value, kv_cache, attn_metadata, rotation=rotation)
        output: torch.Tensor = self.dense(attended)[0]
        return output


class PersimmonMLP(nn.Module):
    """`dense_4h_to_h(act(dense_h_to_4h(x)))`."""

    def __init__(self, config: PretrainedConfig, engine_config: EngineConfig, prefix: str) -> None:
        super().__init__()
        width, inner, quant = config.hidden_size, config.intermediate_size, engine_config.quant_config
        self.dense_h_to_4h = ColumnParallelLinear(width, inner, quant_config=quant, prefix=f"{prefix}.dense_h_to_4h")
        self.dense_4h_to_h = RowParallelLinear(inner, width, quant_config=quant, prefix=f"{prefix}.dense_4h_to_h")
        self.act = get_act_fn(config.hidden_act)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(num_tokens, width)` to the same."""
        output: torch.Tensor = self.dense_4h_to_h(self.act(self.dense_h_to_4h(hidden_states)[0]))[0]
        return output


class PersimmonDecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and around it a residual."""

    def __init__(self, config: PretrainedConfig, engine_config: EngineConfig, prefix: str) -> None:
        super().__init__()
        self.self_attn = PersimmonAttention(config, engine_config, f"{prefix}.self_attn")
        self.mlp = PersimmonMLP(config, engine_config, f"{prefix}.mlp")
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, rotation: Rotation, hidden_states: torch.Tensor, kv_cache: Any, attn_metadata: AttentionMetadata
    ) -> torch.Tensor:
        """`(num_tokens, width)` to the same."""
        normed = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attn(rotation, normed, kv_cache, attn_metadata)
        output: torch.Tensor = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + output


class PersimmonModel(EmbeddedDecoder):
    """Embeddings, layers, and the final norm."""

    def build(self, engine_config: EngineConfig, prefix: str) -> None:
        """See `EmbeddedDecoder`."""
        text = self.config
        self.embed_tokens = VocabParallelEmbedding(text.vocab_size, text.hidden_size, prefix=f"{prefix}.embed_tokens")
        self.rotary_emb = rope_of(engine_config)
        self.layers = nn.ModuleList(
            PersimmonDecoderLayer(text, engine_config, f"{prefix}.layers.{index}")
            for index in range(text.num_hidden_layers)
        )
        self.final_layernorm = nn.LayerNorm(text.hidden_size, eps=text.layer_norm_eps)

    def decode(
        self,
        inputs_embeds: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: Sequence[LayerCache],
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """See `EmbeddedDecoder`."""
        hidden_states, rotation = inputs_embeds, self.rotary_emb.rotation(positions)
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            hidden_states = layer(rotation, hidden_states, kv_cache, attn_metadata)
        normed: torch.Tensor = self.final_layernorm(hidden_states)
        return normed


class PersimmonForCausalLM(HeadedModel):
    """The decoder, and its output head."""

    decoder_class = PersimmonModel

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill the parameters; queries, keys and values are put apart."""
        parameters = dict(self.named_parameters(remove_duplicate=False))
        filled = set()
        for name, tensor in weights:
            if "rotary_emb." in name:
                ignore_weight(tensor)
                continue
            if ".query_key_value." in name:
                heads = tensor.view(self.config.num_attention_heads, 3, -1, *tensor.shape[1:])
                for index, part in enumerate("qkv"):
                    load_parameter(parameters[name], heads[:, index].flatten(0, 1), part)
            else:
                load_parameter(parameters[name], tensor)
            filled.add(name)
        return filled
