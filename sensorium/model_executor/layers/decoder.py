"""The decoder that most language models share: pre-norm attention with rotary positions, and a gated MLP.

Within a layer, parts are run by `forward` instead of `__call__`: in a short decode step the time that
`nn.Module.__call__` spends on looking for hooks is measurable, and nothing hooks these parts. Layers and attention are
called.

A model file states its differences in `DecoderOptions`. Parameter names are those of Llama checkpoints, with the query,
key and value projections fused into `qkv_proj`, and gate and up into `gate_up_proj`.

Source: Touvron et al. 2023; `transformers` `LlamaModel`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from sensorium.attention import Attention, AttentionMetadata, LayerCache
from sensorium.cache_spec import SpanRule
from sensorium.config import EngineConfig, rope_parameters
from sensorium.distributed import current_tensor_parallel
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
from sensorium.model_executor.layers.parameters import copy_weight, new_parameter
from sensorium.model_executor.layers.quantization import QuantizationConfig
from sensorium.model_executor.layers.rotary_embedding import RotaryEmbedding, get_rope
from sensorium.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sensorium.model_executor.model_loader.weight_utils import FUSED_WEIGHTS, load_fused_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MLP_CHUNK_ROWS = 1024
"""Rows that go through an MLP at once on a CPU. With more rows, the intermediate results exceed the memory that the
allocator keeps, and the system would map and clear new pages in every layer. Splitting costs little: with this many
rows, reading the weights again takes a small part of the time."""


@dataclass(frozen=True, slots=True)
class DecoderOptions:
    """Where a model's decoder differs from Llama's."""

    qkv_bias: bool = False
    output_bias: bool = False
    """Bias of the attention's output projection."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """A norm over each head of queries and keys before they are rotated, as `q_norm` and `k_norm`."""
    output_gate: bool = False
    """`q_proj` also computes a gate for each query head, which scales the head's output (Qwen3.5)."""
    query_scale: float | None = None
    """Factor on attention scores; None: `1 / sqrt(head_size)`."""
    score_soft_cap: float | None = None
    """`c` in `c * tanh(score / c)` of attention's scores (Gemma 2)."""
    spans: SpanRule = SpanRule.SEEN
    """How attention treats two-way spans."""
    sinks: bool = False
    """Each query head has a learned score that joins its softmax and has no value vector (attention sinks, GPT-OSS)."""
    norm: type[RMSNorm] = RMSNorm
    """The class of all norms."""
    output_norms: bool = False
    """The outputs of attention and MLP are normed too, before they are added: four norms a layer (Gemma 2)."""
    embed_scale: float | None = None
    """Factor on token embeddings."""
    output_scale: float | None = None
    """Factor on what attention and MLP bring, before it is added (MiniCPM)."""
    rope_by_layer_type: bool = False
    """Each of the config's `layer_types` has its own rotary settings."""
    make_mlp: Callable[[EngineConfig, int, str], nn.Module] | None = None
    """Makes a layer's feed-forward part where it isn't a `GatedMLP`, given the configuration, the layer's index, and
    the part's name in the model."""
    mixers: Mapping[str, tuple[str, Callable[[EngineConfig, str], nn.Module]]] = field(default_factory=dict)
    """For each of the config's `layer_types` that replaces attention: the replacing module's name in the layer, and a
    function that makes it, given the configuration and its name in the model. The module is called with hidden states,
    the layer's cache, and the attention metadata."""


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
        self.has_gate = options.output_gate
        num_parts = 2 if self.has_gate else 1
        self.qkv_proj = QKVParallelLinear(
            text.hidden_size,
            head_size,
            num_parts * num_heads,  # a gate is as if it were one more head
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
            self.q_norm = options.norm(head_size, eps=text.rms_norm_eps)
            self.k_norm = options.norm(head_size, eps=text.rms_norm_eps)
        self.sinks = per_head_parameter(num_heads, "sinks") if options.sinks else None
        self.attn = Attention(
            self.qkv_proj.num_heads // num_parts,
            head_size,
            head_size**-0.5 if options.query_scale is None else options.query_scale,
            num_kv_heads=self.qkv_proj.num_kv_heads,
            cache_config=config.cache_config,
            quant_config=config.quant_config,
            logits_soft_cap=options.score_soft_cap,
            per_layer_sliding_window=sliding_window_of(text, layer),
            prefix=f"{prefix}.attn",
            spans=options.spans,
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
        gate = None
        if self.has_gate:
            query, gate = query[:, 0::2], query[:, 1::2]
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm.forward(query), self.k_norm.forward(key)
        attended: torch.Tensor = self.attn(
            query, key, value, kv_cache, attn_metadata, rotation=rotation, sinks=self.sinks
        )
        if gate is not None:
            attended = attended * torch.sigmoid(gate).flatten(1)
        return self.o_proj.forward(attended)[0]


def per_head_parameter(num_heads: int, name: str) -> nn.Parameter:
    """`(heads,)`: a number for each of this rank's share of a layer's query heads."""
    shard = current_tensor_parallel().shard
    num_own = shard.of(num_heads, "attention heads")

    def load(parameter: torch.Tensor, loaded: torch.Tensor) -> None:
        own = loaded[shard.index * num_own :][:num_own] if len(loaded) == num_heads else loaded
        copy_weight(parameter, own, name)

    return new_parameter(num_own, loader=load)


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
        """On a GPU, widen the inner channels to an aligned width, before the layers lay their weights out."""
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


def mlp_of(config: EngineConfig, prefix: str, *, bias: bool = False) -> GatedMLP:
    """The MLP of a layer that a text config describes."""
    text = config.model_config.hf_text_config
    activation = getattr(text, "hidden_activation", None) or text.hidden_act
    return GatedMLP(text.hidden_size, text.intermediate_size, activation, bias, config.quant_config, prefix)


class DecoderLayer(nn.Module):
    """Attention and MLP, each after a norm. The next norm adds the residual."""

    def __init__(
        self,
        config: EngineConfig,
        options: DecoderOptions,
        layer: int,
        prefix: str,
    ) -> None:
        super().__init__()
        text = config.model_config.hf_text_config
        mixer = options.mixers.get(text.layer_types[layer]) if options.mixers else None
        self.mixer_name = None if mixer is None else mixer[0]
        if mixer is None:
            self.self_attn = DecoderAttention(config, options, layer, f"{prefix}.self_attn")
        else:
            self.add_module(mixer[0], mixer[1](config, f"{prefix}.{mixer[0]}"))
        if options.make_mlp is None:
            self.mlp: nn.Module = mlp_of(config, f"{prefix}.mlp", bias=options.mlp_bias)
        else:
            self.mlp = options.make_mlp(config, layer, f"{prefix}.mlp")
        self.output_scale = options.output_scale
        self.input_layernorm = options.norm(text.hidden_size, eps=text.rms_norm_eps)
        self.post_attention_layernorm = options.norm(text.hidden_size, eps=text.rms_norm_eps)
        self.pre_feedforward_layernorm = self.post_feedforward_layernorm = None
        if options.output_norms:
            self.pre_feedforward_layernorm = options.norm(text.hidden_size, eps=text.rms_norm_eps)
            self.post_feedforward_layernorm = options.norm(text.hidden_size, eps=text.rms_norm_eps)

    def forward(
        self,
        rotation: Rotation,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        kv_cache: Any,
        attn_metadata: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's output, and the residual that is still to be added to it."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm.forward(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm.forward(hidden_states, residual)
        if self.mixer_name is None:
            hidden_states = self.self_attn.forward(rotation, hidden_states, kv_cache, attn_metadata)
        else:
            hidden_states = self.get_submodule(self.mixer_name)(hidden_states, kv_cache, attn_metadata)
        if self.output_scale is not None:
            hidden_states, residual = self.post_attention_layernorm.forward(hidden_states * self.output_scale, residual)
            return self.mlp.forward(hidden_states) * self.output_scale, residual
        if self.pre_feedforward_layernorm is None or self.post_feedforward_layernorm is None:
            hidden_states, residual = self.post_attention_layernorm.forward(hidden_states, residual)
            return self.mlp.forward(hidden_states), residual
        hidden_states = self.post_attention_layernorm.forward(hidden_states)
        hidden_states, residual = self.pre_feedforward_layernorm.forward(hidden_states, residual)
        return self.post_feedforward_layernorm.forward(self.mlp.forward(hidden_states)), residual


class Decoder(nn.Module):
    """Token embeddings, the layers, and the final norm: a language model without its head.

    Args:
        config: Its `hf_text_config` describes the decoder.
        options: Where it differs from Llama.
        prefix: The module's name in the model.
    """

    embed_scale: torch.Tensor | None

    def __init__(self, *, config: EngineConfig, options: DecoderOptions | None = None, prefix: str = "") -> None:
        super().__init__()
        text = config.model_config.hf_text_config
        options = options or DecoderOptions()
        self.embed_tokens = VocabParallelEmbedding(text.vocab_size, text.hidden_size, prefix=f"{prefix}.embed_tokens")
        # A tensor in the model's dtype and on its device: a recorded pass can't copy it from the host.
        scale = None if options.embed_scale is None else torch.tensor(options.embed_scale)
        self.register_buffer("embed_scale", scale, persistent=False)
        types = text.layer_types if options.rope_by_layer_type else ["every"] * text.num_hidden_layers
        self._rope_names: list[str] = types
        ropes = {each: rope_of(config, each if options.rope_by_layer_type else None) for each in sorted(set(types))}
        self.rotary_embs = nn.ModuleDict(ropes)
        self.layers = nn.ModuleList(
            DecoderLayer(config, options, layer, f"{prefix}.layers.{layer}") for layer in range(text.num_hidden_layers)
        )
        self.norm = options.norm(text.hidden_size, eps=text.rms_norm_eps)

    def get_input_embeddings(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings `(num_tokens, hidden_size)`, scaled if the model has a factor, which is rounded to their
        dtype as in training."""
        embeddings: torch.Tensor = self.embed_tokens(input_ids)
        return embeddings if self.embed_scale is None else embeddings * self.embed_scale

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        kv_caches: Sequence[LayerCache],
        attn_metadata: AttentionMetadata,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states `(num_tokens, hidden_size)` of a flat batch.

        Args:
            input_ids: `(num_tokens,)`; not needed with `inputs_embeds`.
            positions: `(num_tokens,)`, or `(3, num_tokens)` for a model with M-RoPE.
            kv_caches: One entry per layer, see `sensorium.worker.kv_cache`.
            attn_metadata: The step's batch.
            intermediate_tensors: Ignored; there are no pipeline stages.
            inputs_embeds: `(num_tokens, hidden_size)`, used instead of the ids' embeddings. With DeepStack they are
                `(1 + n) * hidden_size` wide: part `i` of the `n` further ones is added to the output of layer `i`.
        """
        if inputs_embeds is None:
            assert input_ids is not None, "a decoder needs input_ids or inputs_embeds"
            inputs_embeds = self.get_input_embeddings(input_ids)
        hidden_states, *added = torch.split(inputs_embeds, self.embed_tokens.embedding_dim, -1)
        residual: torch.Tensor | None = None
        rotations = {name: cast(RotaryEmbedding, rope).rotation(positions) for name, rope in self.rotary_embs.items()}
        for layer, name, kv_cache in zip(self.layers, self._rope_names, kv_caches, strict=True):
            hidden_states, residual = layer(rotations[name], hidden_states, residual, kv_cache, attn_metadata)
            if added:
                hidden_states = hidden_states + added.pop(0)
        normed: torch.Tensor = self.norm(hidden_states, residual)[0]
        return normed

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill the parameters from a Llama-style checkpoint's names, relative to the decoder."""
        return load_fused_weights(self, weights, FUSED_WEIGHTS)


def head_size_of(text_config: PretrainedConfig) -> int:
    """Channels of an attention head."""
    return int(getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads)


def sliding_window_of(text_config: PretrainedConfig, layer: int) -> int | None:
    """The layer's window in positions; None without one."""
    window = getattr(text_config, "sliding_window", None)
    layer_types = getattr(text_config, "layer_types", None)
    if layer_types is not None and layer_types[layer] != "sliding_attention":
        return None
    return window


def rope_of(config: EngineConfig, layer_type: str | None = None) -> RotaryEmbedding:
    """The rotary embedding that a text config (or the engine option `rope_scaling`) describes.

    `layer_type`: whose settings to take, where the config has some for each type of layer. `rope_scaling` applies to
    layers of full attention only: layers with a window never see beyond the trained length.
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
