"""The attention layers that model files use: `Attention` over the paged cache, `MultiHeadAttention` without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sensorium.attention.backend import AttentionBackend, AttentionSpec, select_backend
from sensorium.attention.metadata import AttentionMetadata
from sensorium.cache_spec import (
    CacheSpec,
    ChunkedAttentionSpec,
    CrossAttentionSpec,
    FullAttentionSpec,
    SharedCacheSpec,
    SlidingWindowSpec,
    SpanRule,
)
from sensorium.config import AttentionBackendName
from sensorium.errors import ModelError
from sensorium.kernels import Rotation, rotary_embedding, rotate_and_write_kv, split_cache, write_kv
from sensorium.kernels.attention import is_fp8, key_ranges

if TYPE_CHECKING:
    from sensorium.model_executor.layers.quantization import QuantizationConfig


class AttentionType(StrEnum):
    """Who attends to what."""

    DECODER = "decoder"
    """A position sees itself and earlier positions of its sequence, through the cache."""
    ENCODER = "encoder"
    """Every row sees every row of its sequence; no cache. The encoder of an encoder-decoder model."""
    ENCODER_ONLY = "encoder_only"
    """The same, in a model that has no decoder."""
    ENCODER_DECODER = "encoder_decoder"
    """A decoder's rows see all rows of an item's encoder, which have a cache of their own (cross-attention)."""


class _AttentionBase(nn.Module):
    """Constants and the backend, which is chosen at the first call, when device and dtype are known."""

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        if spec.num_kv_heads < 1 or spec.num_heads % spec.num_kv_heads:
            raise ModelError(
                f"attention heads: got {spec.num_heads} query heads over {spec.num_kv_heads} key/value heads, "
                "expected a multiple. Check num_heads and num_kv_heads."
            )
        self.spec = spec
        self.num_heads = spec.num_heads
        self.num_kv_heads = spec.num_kv_heads
        self.head_size = spec.head_size
        self.scale = spec.scale
        self._backend: AttentionBackend | None = None
        self._backend_key: tuple[str, torch.dtype] | None = None
        self._forced_backend: AttentionBackendName | None = None

    def choose_backend(self, device_type: str, dtype: torch.dtype, forced: AttentionBackendName | None = None) -> None:
        """Choose now, and from now on, the backend of this name, or the fastest. See `select_backend`."""
        self._forced_backend = forced
        self._backend = select_backend(self.spec, device_type, dtype, forced)
        self._backend_key = (device_type, dtype)

    def _backend_for(self, query: torch.Tensor) -> AttentionBackend:
        if self._backend is None or self._backend_key != (query.device.type, query.dtype):
            self.choose_backend(query.device.type, query.dtype, self._forced_backend)
        assert self._backend is not None
        return self._backend

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"heads={self.num_heads}, kv_heads={self.num_kv_heads}, head_size={self.head_size}"


class Attention(_AttentionBase):
    """Attention of a decoder layer over the paged KV cache, mostly causal and of a sequence to itself.

    Rows are the flat batch of one step; the metadata says which of them belong together, so the layer serves prefill
    chunks and decodes of many requests in one call. It also says which spans have positions that see one another both
    ways (`AttentionMetadata.row_spans`).

    Args:
        num_heads: Query heads.
        head_size: Channels per head.
        scale: Factor on the scores, usually `head_size ** -0.5`.
        num_kv_heads: Key/value heads, `num_heads` by default.
        alibi_slopes: Not supported.
        cache_config: Accepted for models that pass it; not used.
        quant_config: Accepted for models that pass it; not used.
        blocksparse_params: Not supported.
        logits_soft_cap: `c` in `c * tanh(score / c)`; 0 or `None` for none.
        per_layer_sliding_window: How many positions this layer sees, the current one included; `None` for
            all.
        prefix: The layer's name in the checkpoint, for error messages.
        attention_chunk_size: A position sees only those of its own chunk of so many (Llama 4); `None` for all.
        head_size_v: Channels of a head's value and output, `head_size` by default.
        attn_type: See `AttentionType`.
        kv_sharing_target_layer_name: The layer whose cache this one reads, by its name in the model; `None`: it has one
            of its own.
        spans: What it makes of spans whose positions see one another both ways.

    Raises:
        ModelError: An option is not supported.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: Sequence[float] | None = None,
        cache_config: Any = None,
        quant_config: QuantizationConfig | None = None,
        blocksparse_params: dict[str, Any] | None = None,
        logits_soft_cap: float | None = None,
        per_layer_sliding_window: int | None = None,
        prefix: str = "",
        *,
        attention_chunk_size: int | None = None,
        head_size_v: int | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        spans: SpanRule = SpanRule.SEEN,
    ) -> None:
        for name, option in (("alibi_slopes", alibi_slopes), ("blocksparse_params", blocksparse_params)):
            if option is not None:
                raise ModelError(
                    f"attention layer {prefix or '(without prefix)'}: got {name}, which is not supported, "
                    f"expected none. Leave {name} out, or serve the model through another implementation."
                )
        for name, size in (
            ("per_layer_sliding_window", per_layer_sliding_window),
            ("attention_chunk_size", attention_chunk_size),
        ):
            if size is not None and size < 1:
                raise ModelError(
                    f"{name}: got {size}, expected at least 1. Leave it out for a layer that sees everything."
                )
        super().__init__(
            AttentionSpec(
                num_heads=num_heads,
                num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
                head_size=head_size,
                scale=float(scale),
                head_size_v=head_size_v,
                window=per_layer_sliding_window,
                softcap=float(logits_soft_cap) if logits_soft_cap else None,
                chunk=attention_chunk_size,
            )
        )
        self.prefix = prefix
        self.group_index = 0
        """Its cache group among the model's; set when loading has found all layers."""
        self.k_scale = self.v_scale = 1.0
        """What cached keys and values of 8 bits are multiplied by. A checkpoint may bring others."""
        self._attn_type = attn_type
        self._cache: torch.Tensor | None = None
        self._parts: tuple[torch.Tensor, torch.Tensor] | None = None
        self._rules: dict[tuple[bool, bool], AttentionSpec] = {}
        self._shared_layer = kv_sharing_target_layer_name
        self._spans = spans

    def use_cache_of(self, dtype: torch.dtype) -> None:
        """Let backends that can't read a cache of this type refuse the layer."""
        self.spec = replace(self.spec, cache_dtype=dtype)
        self._rules.clear()

    def cache_spec(self) -> CacheSpec:
        """What this layer keeps of a sequence."""
        if self._shared_layer is not None:
            return SharedCacheSpec(self._shared_layer)
        sizes = (self.num_kv_heads, self.head_size, self.spec.value_size)
        if self._attn_type == AttentionType.ENCODER_DECODER:
            return CrossAttentionSpec(*sizes)
        if self.spec.window is not None:
            return SlidingWindowSpec(*sizes, self.spec.window, spans=self._spans)
        if self.spec.chunk is not None:
            return ChunkedAttentionSpec(*sizes, self.spec.chunk, spans=self._spans)
        return FullAttentionSpec(*sizes, spans=self._spans)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        attn_metadata: AttentionMetadata,
        attn_type: str | None = None,
        rotation: Rotation | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend; with a cache, first store `key` and `value` in it.

        Args:
            query: `(num_tokens, num_heads * head_size)`, or the same with the heads as an axis.
            key: `(num_tokens, num_kv_heads * head_size)`, likewise. Of cross-attention the rows of those items that the
                cache doesn't have yet. `None`: the cache holds everything, as for a layer that reads another layer's
                cache.
            value: As `key`, with `head_size_v` channels.
            kv_cache: This layer's cache, see `AttentionSpec`. `None` or empty: the given rows are all there is
                (profiling), and nothing is written.
            attn_metadata: The step's batch. Of cross-attention: `seq_lens`, `block_table` and `slot_mapping` are those
                of the items' rows.
            attn_type: See `AttentionType`; that of the layer by default.
            rotation: How queries and keys, which then have the heads as an axis, are rotated first. With a cache that
                takes no memory access of its own.
            sinks: `(num_heads,)` learned scores that take part in each head's softmax without a value.

        Returns:
            `(num_tokens, num_heads * head_size_v)`.

        Raises:
            ModelError: `attn_type` is not supported, there are neither keys nor a cache, or not a sink for each head.
        """
        attn_type = self._attn_type if attn_type is None else attn_type
        backend = self._backend_for(query)
        paged = attn_type in (AttentionType.DECODER, AttentionType.ENCODER_DECODER)
        if not paged and attn_type not in (AttentionType.ENCODER, AttentionType.ENCODER_ONLY):
            raise ModelError(
                f"attention type of {self._name()}: got {attn_type!r}, expected one of "
                f"{', '.join(repr(each.value) for each in AttentionType)}. Change attn_type."
            )
        if sinks is not None and sinks.shape != (self.num_heads,):
            raise ModelError(
                f"sinks of {self._name()}: got a tensor of shape {tuple(sinks.shape)}, expected ({self.num_heads},). "
                "Give one score for each of the layer's query heads."
            )
        rules = self._rules_of(attn_type == AttentionType.DECODER, kv_cache)
        if paged and kv_cache is not None and kv_cache.numel() > 0:
            batch = attn_metadata.of_group(self.group_index)
            keys, values = self._split(kv_cache)
            if key is None or value is None or self._shared_layer is not None:
                query = query if rotation is None else rotary_embedding(query, query[:, :1], *rotation)[0]
            elif rotation is None:
                write_kv(key, value, keys, values, batch.slot_mapping, rules.k_scale, rules.v_scale)
            else:
                query = rotate_and_write_kv(
                    query, key, value, rotation, keys, values, batch.slot_mapping, rules.k_scale, rules.v_scale
                )
            # Flat or not: with a cache at hand, backends know the head size.
            out = backend.paged(query, keys, values, batch, rules, sinks)
        elif key is None or value is None:
            out = self._without_keys(query, attn_type)
        else:
            q = query.reshape(-1, self.num_heads, self.head_size)
            k = key.reshape(-1, self.num_kv_heads, self.head_size)
            v = value.reshape(-1, self.num_kv_heads, self.spec.value_size)
            if rotation is not None:
                q, k = rotary_embedding(q, k, *rotation)
            if attn_type == AttentionType.ENCODER_DECODER:
                # Flat rows are a cache of blocks of one token each.
                batch = attn_metadata.of_group(self.group_index)
                batch = replace(batch, block_table=_rows_as_blocks(batch))
                out = backend.paged(q, k[:, None], v[:, None], batch, rules, sinks)
            else:
                starts = attn_metadata.cu_seqlens_q
                spans = self._spans_of(attn_metadata) if rules.causal else None
                out = backend.varlen(q, k, v, starts, rules, sinks=sinks, row_spans=spans)
        return out if out.dim() == 2 else out.flatten(1)

    def _rules_of(self, is_causal: bool, kv_cache: torch.Tensor | None) -> AttentionSpec:
        """The layer's rules in a pass with such a cache: scales apply to 8 bits only."""
        is_scaled = kv_cache is not None and is_fp8(kv_cache)
        rules = self._rules.get((is_causal, is_scaled))
        if rules is None:
            scales = (self.k_scale, self.v_scale) if is_scaled else (1.0, 1.0)
            rules = replace(self.spec, causal=is_causal, k_scale=scales[0], v_scale=scales[1])
            self._rules[is_causal, is_scaled] = rules
        return rules

    def _spans_of(self, metadata: AttentionMetadata) -> torch.Tensor | None:
        """The spans of a batch without a cache, by the layer's rule. Where there is a cache, the worker has applied the
        rule."""
        spans = metadata.row_spans
        if spans is None or self._spans is SpanRule.IGNORED:
            return None
        if self._spans is SpanRule.SEEN:
            return spans
        starts, counts = metadata.cu_seqlens_q[:-1], metadata.cu_seqlens_q.diff()
        rows = torch.arange(metadata.num_tokens, dtype=spans.dtype, device=spans.device)
        positions = rows - starts.repeat_interleave(counts, output_size=metadata.num_tokens)
        first_seen, _ = key_ranges(positions, metadata.num_tokens, self.spec)
        return torch.stack((torch.maximum(spans[0], first_seen), spans[1]))

    def _without_keys(self, query: torch.Tensor, attn_type: str) -> torch.Tensor:
        """Without a cache and without keys: zeros for cross-attention, as if there were no media; `ModelError` for
        other layers."""
        if attn_type == AttentionType.ENCODER_DECODER:
            return query.new_zeros(len(query), self.num_heads * self.spec.value_size)
        raise ModelError(
            f"{self._name()}: got neither a cache nor keys and values, expected one of them. In a pass without a "
            "cache, give a layer that shares another's cache that layer's key and value."
        )

    def _split(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of this layer's cache, which is the same in every step."""
        if self._parts is None or self._cache is not kv_cache:
            self._cache, self._parts = kv_cache, split_cache(kv_cache, self.head_size, self.spec.value_size)
        return self._parts

    def _name(self) -> str:
        return f"attention layer {self.prefix or '(without prefix)'}"


def _rows_as_blocks(metadata: AttentionMetadata) -> torch.Tensor:
    """`(num_seqs, max_seq_len)` int32: the rows of each sequence, if they lie one sequence after the other."""
    ends = metadata.seq_lens.cumsum(0, dtype=torch.int32)
    within = torch.arange(metadata.max_seq_len, dtype=torch.int32, device=ends.device)
    rows = (ends - metadata.seq_lens)[:, None] + within
    return rows.where(within < metadata.seq_lens[:, None], 0)


class MultiHeadAttention(_AttentionBase):
    """Bidirectional attention of an encoder, without a cache.

    Two forms, for a batch of images, for example:

    - `(B, S, H * D)`: `B` sequences of one length; with `key_lens`, only the leading keys of each count.
    - `(T, H * D)` with `cu_seqlens`: sequences of any lengths, one after another, in one block-diagonal call.

    Args:
        num_heads: Query heads.
        head_size: Channels per head.
        scale: Factor on the scores, usually `head_size ** -0.5`.
        num_kv_heads: Key/value heads, `num_heads` by default.
        head_size_v: Channels of a head's value and output, `head_size` by default.
        causal: Whether a position sees only itself and earlier ones.
        window: See `AttentionRules`.
        chunk: See `AttentionRules`.
        softcap: See `AttentionRules`.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        *,
        head_size_v: int | None = None,
        causal: bool = False,
        window: int | None = None,
        chunk: int | None = None,
        softcap: float | None = None,
    ) -> None:
        super().__init__(
            AttentionSpec(
                num_heads=num_heads,
                num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
                head_size=head_size,
                scale=float(scale),
                head_size_v=head_size_v,
                window=window,
                softcap=softcap,
                chunk=chunk,
                causal=causal,
            )
        )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor | Sequence[int] | None = None,
        key_lens: torch.Tensor | Sequence[int] | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend within each sequence.

        Args:
            query: `(B, S, num_heads * head_size)` or `(T, num_heads * head_size)`.
            key: The same rows with `num_kv_heads * head_size` channels.
            value: As `key`.
            cu_seqlens: `(num_seqs + 1,)` ints from 0 to `T`, for the flat form. Without it a flat `(T, ...)`
                is one sequence.
            key_lens: `(num_seqs,)` ints, how many leading keys of each sequence are real; the others are
                never seen. Outputs of a sequence without any are 0.
            sinks: See `Attention.forward`.

        Returns:
            The shape of `query`, with `num_heads * head_size_v` channels.
        """
        num_rows = query.shape[:-1].numel()
        q = query.reshape(num_rows, self.num_heads, self.head_size)
        k = key.reshape(num_rows, self.num_kv_heads, self.head_size)
        v = value.reshape(num_rows, self.num_kv_heads, self.spec.value_size)
        if cu_seqlens is None:
            length = query.shape[-2]
            starts = torch.arange(0, num_rows + 1, max(length, 1), dtype=torch.int32, device=query.device)
        else:
            starts = _int32_tensor(cu_seqlens, query.device)
        lens = None if key_lens is None else _int32_tensor(key_lens, query.device)
        out = self._backend_for(q).varlen(q, k, v, starts, self.spec, key_lens=lens, sinks=sinks)
        return out.reshape(*query.shape[:-1], self.num_heads * self.spec.value_size)


def _int32_tensor(values: torch.Tensor | Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.int32, device=device)


def choose_backends(
    model: nn.Module,
    device_type: str,
    dtype: torch.dtype,
    forced: AttentionBackendName | None = None,
    cache_dtype: torch.dtype | None = None,
) -> None:
    """Let all attention layers of a model choose their backend now.

    Args:
        model: What has the layers.
        device_type: Where they will run, as in `torch.device.type`.
        dtype: Of their rows.
        forced: The name of the backend that all have to take; `None`: each the fastest.
        cache_dtype: Of layers' caches; `None`: that of their rows.

    Raises:
        ConfigError: A layer can't run by the forced backend.
    """
    for module in model.modules():
        if isinstance(module, Attention):
            module.use_cache_of(dtype if cache_dtype is None else cache_dtype)
        if isinstance(module, _AttentionBase):
            module.choose_backend(device_type, dtype, forced)
