"""OPT, with V0's constructors: learned positions, layer norms before attention and MLP, or behind them.

Paper: Zhang et al. 2022, "OPT", section 2. Reference: `transformers` `OPTForCausalLM`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sensorium.attention import Attention, AttentionMetadata, LayerCache
from sensorium.compat.v0.layer_norm_models import EmbeddedDecoder, HeadedModel
from sensorium.config import EngineConfig
from sensorium.model_executor.layers.activation import get_act_fn
from sensorium.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from sensorium.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sensorium.model_executor.model_loader.weight_utils import FUSED_WEIGHTS, load_fused_weights
from sensorium.model_executor.weight_tracking import ignore_weight

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["OPTForCausalLM", "OPTModel"]

FIRST_POSITION = 2
"""Where the table of positions begins to count."""


class OPTAttention(nn.Module):
    """Self-attention over the paged cache."""

    def __init__(self, config: PretrainedConfig, engine_config: EngineConfig, prefix: str) -> None:
        super().__init__()
        width, heads, bias = config.hidden_size, config.num_attention_heads, config.enable_bias
        quant = engine_config.quant_config
        self.qkv_proj = QKVParallelLinear(
            width, width // heads, heads, bias=bias, quant_config=quant, prefix=f"{prefix}.qkv_proj"
        )
        self.out_proj = RowParallelLinear(width, width, bias=bias, quant_config=quant, prefix=f"{prefix}.out_proj")
        self.attn = Attention(
            self.qkv_proj.num_heads,
            self.qkv_proj.head_size,
            self.qkv_proj.head_size**-0.5,
            cache_config=engine_config.cache_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, hidden_states: torch.Tensor, kv_cache: Any, attn_metadata: AttentionMetadata) -> torch.Tensor:
        """`(num_tokens, width)` to the same."""
        query, key, value = self.qkv_proj.split(self.qkv_proj(hidden_states)[0])
        output: torch.Tensor = self.out_proj(self.attn(query, key, value, kv_cache, attn_metadata))[0]
        return output


class OPTDecoderLayer(nn.Module):
    """Attention and MLP, with a norm before each, or behind where it was added."""

    def __init__(self, config: PretrainedConfig, engine_config: EngineConfig, prefix: str) -> None:
        super().__init__()
        width, bias, quant = config.hidden_size, config.enable_bias, engine_config.quant_config
        self.norms_before = config.do_layer_norm_before
        self.self_attn = OPTAttention(config, engine_config, f"{prefix}.self_attn")
        self.self_attn_layer_norm = nn.LayerNorm(width, elementwise_affine=config.layer_norm_elementwise_affine)
        self.fc1 = ColumnParallelLinear(width, config.ffn_dim, bias=bias, quant_config=quant, prefix=f"{prefix}.fc1")
        self.activation_fn = get_act_fn(config.activation_function)
        self.fc2 = RowParallelLinear(config.ffn_dim, width, bias=bias, quant_config=quant, prefix=f"{prefix}.fc2")
        self.final_layer_norm = nn.LayerNorm(width, elementwise_affine=config.layer_norm_elementwise_affine)

    def forward(self, hidden_states: torch.Tensor, kv_cache: Any, attn_metadata: AttentionMetadata) -> torch.Tensor:
        """`(num_tokens, width)` to the same."""
        if self.norms_before:
            normed = self.self_attn_layer_norm(hidden_states)
            hidden_states = hidden_states + self.self_attn(normed, kv_cache, attn_metadata)
            return hidden_states + self._transform(self.final_layer_norm(hidden_states))
        hidden_states = hidden_states + self.self_attn(hidden_states, kv_cache, attn_metadata)
        hidden_states = self.self_attn_layer_norm(hidden_states)
        output: torch.Tensor = self.final_layer_norm(hidden_states + self._transform(hidden_states))
        return output

    def _transform(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.fc2(self.activation_fn(self.fc1(hidden_states)[0]))[0]
        return output


class OPTDecoder(nn.Module):
    """Embeddings, layers, and the norm behind them where each layer begins with one."""

    def __init__(self, config: PretrainedConfig, engine_config: EngineConfig, prefix: str) -> None:
        super().__init__()
        width, outer_width = config.hidden_size, config.word_embed_proj_dim
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, outer_width, prefix=f"{prefix}.embed_tokens")
        self.embed_positions = nn.Embedding(config.max_position_embeddings + FIRST_POSITION, width)
        self.project_in = self.project_out = None
        if outer_width != width:
            self.project_in = ReplicatedLinear(outer_width, width, bias=False, prefix=f"{prefix}.project_in")
            self.project_out = ReplicatedLinear(width, outer_width, bias=False, prefix=f"{prefix}.project_out")
        self.final_layer_norm = None
        if config.do_layer_norm_before and not getattr(config, "_remove_final_layer_norm", False):
            self.final_layer_norm = nn.LayerNorm(width, elementwise_affine=config.layer_norm_elementwise_affine)
        self.layers = nn.ModuleList(
            OPTDecoderLayer(config, engine_config, f"{prefix}.layers.{index}")
            for index in range(config.num_hidden_layers)
        )

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: Sequence[LayerCache],
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Rows `(num_tokens, outer width)` to hidden states of the same shape."""
        if self.project_in is not None:
            inputs_embeds = self.project_in(inputs_embeds)[0]
        hidden_states: torch.Tensor = inputs_embeds + self.embed_positions(positions + FIRST_POSITION)
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            hidden_states = layer(hidden_states, kv_cache, attn_metadata)
        if self.final_layer_norm is not None:
            hidden_states = self.final_layer_norm(hidden_states)
        if self.project_out is not None:
            hidden_states = self.project_out(hidden_states)[0]
        return hidden_states


class OPTModel(EmbeddedDecoder):
    """The decoder, under its name."""

    def build(self, engine_config: EngineConfig, prefix: str) -> None:
        """See `EmbeddedDecoder`."""
        self.decoder = OPTDecoder(self.config, engine_config, f"{prefix}.decoder")

    @property
    def embed_tokens(self) -> VocabParallelEmbedding:  # type: ignore[override]
        """The table of token embeddings."""
        return self.decoder.embed_tokens

    def decode(
        self,
        inputs_embeds: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: Sequence[LayerCache],
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """See `EmbeddedDecoder`."""
        hidden_states: torch.Tensor = self.decoder(inputs_embeds, positions, kv_caches, attn_metadata)
        return hidden_states


class OPTForCausalLM(HeadedModel):
    """The decoder, and its output head, which mostly is the embeddings."""

    decoder_class = OPTModel

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill the parameters; names may lack the level `model`."""
        return load_fused_weights(self, self._wanted(weights), FUSED_WEIGHTS)

    def _wanted(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            if name.startswith("lm_head.") and self.config.tie_word_embeddings:
                ignore_weight(tensor)
            else:
                yield f"model.{name}" if name.startswith("decoder.") else name, tensor
