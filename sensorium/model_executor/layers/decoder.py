"""The decoder that most language models share: pre-norm attention with rotary positions, and a gated MLP.

Within a layer, parts are run by `forward` instead of being called: a decoding step is short enough for the hooks of
`nn.Module.__call__`, which nothing uses there, to be felt. Layers and attention are called.

A model file says with `DecoderOptions` where it differs. Parameter names are those of Llama checkpoints, with
the query, key and value projections fused into `qkv_proj`, and gate and up into `gate_up_proj`.

Source: Touvron et al. 2023; `transformers` `LlamaModel`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sensorium.attention import Attention, AttentionMetadata
from sensorium.config import EngineConfig, rope_parameters
from sensorium.kernels import Rotation
from sensorium.model_executor.adapter_rows import split_rows
from sensorium.model_executor.layers.activation import get_act_and_mul_fn
from sensorium.model_executor.layers.layernorm import RMSNorm
from sensorium.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    widen_inner,
)
from sensorium.model_executor.layers.quantization import QuantizationConfig
from sensorium.model_executor.layers.rotary_embedding import RotaryEmbedding, get_rope
from sensorium.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sensorium.model_executor.model_loader.weight_utils import FUSED_WEIGHTS, load_fused_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MLP_CHUNK_ROWS = 1024
"""Rows that go through an MLP at once on a CPU. The inner results of more outgrow the memory that a process keeps, and
the system would clear new pages for them in every layer; the weights are read anew for so many anyway."""


@dataclass(frozen=True, slots=True)
class DecoderOptions:
    """Where a model's decoder differs from Llama's."""

    qkv_bias: bool = False
    output_bias: bool = False
    """Bias of the attention's output projection."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """A norm over each head of queries and keys before they are rotated, as `q_norm` and `k_norm`."""


class DecoderAttention(nn.Module):
    """Self-attention with rotary positions over the paged cache."""

    def __init__(
        self,
        config: EngineConfig,
        options: DecoderOptions,
        layer: int,
        prefix: str,
    ) -> None:
        super().__init__()
        text = config.model_config.hf_text_config
        head_size = head_size_of(text)
        num_heads = text.num_attention_heads
        num_kv_heads = getattr(text, "num_key_value_heads", None) or num_heads
        self.qkv_proj = QKVParallelLinear(
            text.hidden_size,
            head_size,
            num_heads,
            num_kv_heads,
            bias=options.qkv_bias,
            quant_config=config.quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            num_heads * head_size,
            text.hidden_size,
            bias=options.output_bias,
            quant_config=config.quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.q_norm = self.k_norm = None
        if options.qk_norm:
            self.q_norm = RMSNorm(head_size, eps=text.rms_norm_eps)
            self.k_norm = RMSNorm(head_size, eps=text.rms_norm_eps)
        self.attn = Attention(
            self.qkv_proj.num_heads,
            head_size,
            head_size**-0.5,
            num_kv_heads=self.qkv_proj.num_kv_heads,
            cache_config=config.cache_config,
            quant_config=config.quant_config,
            per_layer_sliding_window=sliding_window_of(text, layer),
            prefix=f"{prefix}.attn",
        )

    def forward(
        self,
        rotation: Rotation,
        hidden_states: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """`(num_tokens, hidden_size)` to the same, given the step's rotation."""
        qkv, _ = self.qkv_proj.forward(hidden_states)
        query, key, value = self.qkv_proj.split_heads(qkv)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm.forward(query), self.k_norm.forward(key)
        attended: torch.Tensor = self.attn(query, key, value, kv_cache, attn_metadata, rotation=rotation)
        return self.o_proj.forward(attended)[0]


class GatedMLP(nn.Module):
    """`down(act(gate(x)) * up(x))`. Source: Shazeer 2020."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str,
        bias: bool = False,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden_size,
            [intermediate_size] * 2,
            bias=bias,
            quant_config=quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = RowParallelLinear(
            intermediate_size, hidden_size, bias=bias, quant_config=quant_config, prefix=f"{prefix}.down_proj"
        )
        self.act_fn = get_act_and_mul_fn(hidden_act)

    def process_weights_after_loading(self) -> None:
        """On a GPU, give the inner channels a friendly width, before the layers lay their weights out."""
        if self.gate_up_proj.weight.is_cuda:
            widen_inner(self.gate_up_proj, self.down_proj, num_parts=2)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(num_tokens, hidden_size)` to the same."""
        if hidden_states.is_cpu and hidden_states.shape[0] > MLP_CHUNK_ROWS:
            return torch.cat([self._transform(rows) for rows in split_rows(hidden_states, MLP_CHUNK_ROWS)])
        return self._transform(hidden_states)

    def _transform(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate_up, _ = self.gate_up_proj.forward(hidden_states)
        return self.down_proj.forward(self.act_fn.forward(gate_up))[0]


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and around it a residual that is added in the next norm."""

    def __init__(
        self,
        config: EngineConfig,
        options: DecoderOptions,
        layer: int,
        prefix: str,
    ) -> None:
        super().__init__()
        text = config.model_config.hf_text_config
        self.self_attn = DecoderAttention(config, options, layer, f"{prefix}.self_attn")
        self.mlp = GatedMLP(
            text.hidden_size,
            text.intermediate_size,
            text.hidden_act,
            bias=options.mlp_bias,
            quant_config=config.quant_config,
            prefix=f"{prefix}.mlp",
        )
        self.input_layernorm = RMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(text.hidden_size, eps=text.rms_norm_eps)

    def forward(
        self,
        rotation: Rotation,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's output, and the residual that is still to be added to it."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm.forward(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm.forward(hidden_states, residual)
        hidden_states = self.self_attn.forward(rotation, hidden_states, kv_cache, attn_metadata)
        hidden_states, residual = self.post_attention_layernorm.forward(hidden_states, residual)
        return self.mlp.forward(hidden_states), residual


class Decoder(nn.Module):
    """Token embeddings, the layers, and the final norm: a language model without its head.

    Args:
        config: Its `hf_text_config` describes the decoder.
        options: Where it differs from Llama.
        prefix: The module's name in the model.
    """

    def __init__(self, *, config: EngineConfig, options: DecoderOptions | None = None, prefix: str = "") -> None:
        super().__init__()
        text = config.model_config.hf_text_config
        options = options or DecoderOptions()
        self.embed_tokens = VocabParallelEmbedding(text.vocab_size, text.hidden_size, prefix=f"{prefix}.embed_tokens")
        self.rotary_emb = rope_of(config)
        self.layers = nn.ModuleList(
            DecoderLayer(config, options, layer, f"{prefix}.layers.{layer}") for layer in range(text.num_hidden_layers)
        )
        self.norm = RMSNorm(text.hidden_size, eps=text.rms_norm_eps)

    def get_input_embeddings(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings `(num_tokens, hidden_size)`."""
        embeddings: torch.Tensor = self.embed_tokens(input_ids)
        return embeddings

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        kv_caches: Sequence[torch.Tensor],
        attn_metadata: AttentionMetadata,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states `(num_tokens, hidden_size)` of a flat batch.

        Args:
            input_ids: `(num_tokens,)`; not needed with `inputs_embeds`.
            positions: `(num_tokens,)`, or `(3, num_tokens)` for a model with M-RoPE.
            kv_caches: One tensor per layer, `(2, num_blocks, block_size, num_kv_heads, head_size)`.
            attn_metadata: The step's batch.
            intermediate_tensors: Of an earlier pipeline stage; there is none.
            inputs_embeds: `(num_tokens, hidden_size)`, used in the place of the ids' embeddings.
        """
        if inputs_embeds is None:
            assert input_ids is not None, "a decoder needs input_ids or inputs_embeds"
            inputs_embeds = self.get_input_embeddings(input_ids)
        hidden_states = inputs_embeds
        residual: torch.Tensor | None = None
        rotation = self.rotary_emb.rotation(positions)
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            hidden_states, residual = layer(rotation, hidden_states, residual, kv_cache, attn_metadata)
        normed: torch.Tensor = self.norm(hidden_states, residual)[0]
        return normed

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill the parameters from a Llama-style checkpoint's names, relative to the decoder."""
        return load_fused_weights(self, weights, FUSED_WEIGHTS)


def head_size_of(text_config: PretrainedConfig) -> int:
    """Channels of an attention head."""
    return int(getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads)


def sliding_window_of(text_config: PretrainedConfig, layer: int) -> int | None:
    """How many positions a layer sees; None for all."""
    window = getattr(text_config, "sliding_window", None)
    layer_types = getattr(text_config, "layer_types", None)
    if layer_types is not None and layer_types[layer] != "sliding_attention":
        return None
    return window


def rope_of(config: EngineConfig, layer_type: str | None = None) -> RotaryEmbedding:
    """The rotary embedding that a text config (or the engine option `rope_scaling`) describes.

    `layer_type`: which of several, where the config has one for each type of layer. The option is for layers that see
    everything: others see no farther than they were trained to.
    """
    text = config.model_config.hf_text_config
    parameters = dict(rope_parameters(text))
    if layer_type is not None:
        parameters = dict(parameters[layer_type])
    if layer_type != "sliding_attention":
        parameters |= config.model_config.rope_scaling or {}
    head_size = head_size_of(text)
    theta = parameters.get("rope_theta") or getattr(text, "rope_theta", None) or 10000.0
    partial = parameters.get("partial_rotary_factor") or getattr(text, "partial_rotary_factor", None) or 1.0
    return get_rope(
        head_size,
        head_size,
        text.max_position_embeddings,
        theta,
        rope_scaling=parameters,
        partial_rotary_factor=partial,
    )
