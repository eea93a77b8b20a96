"""The attention layers that model files use: `Attention` over the paged cache, `MultiHeadAttention` without one."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sensorium.attention.backend import AttentionBackend, AttentionSpec, select_backend
from sensorium.attention.metadata import AttentionMetadata
from sensorium.cache_spec import CacheSpec, FullAttentionSpec, SlidingWindowSpec
from sensorium.errors import ModelError
from sensorium.kernels import Rotation, rotary_embedding, rotate_and_write_kv, write_kv

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
    """A decoder's rows see an encoder's."""


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

    def _backend_for(self, query: torch.Tensor) -> AttentionBackend:
        key = (query.device.type, query.dtype)
        if self._backend is None or self._backend_key != key:
            self._backend = select_backend(self.spec, *key)
            self._backend_key = key
        return self._backend

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"heads={self.num_heads}, kv_heads={self.num_kv_heads}, head_size={self.head_size}"


class Attention(_AttentionBase):
    """Causal self-attention of a decoder layer over the paged KV cache.

    Rows are the flat batch of one step; which of them belong together is the metadata's business, so the
    layer serves prefill chunks and decodes of many requests in one call.

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
    ) -> None:
        for name, option in (("alibi_slopes", alibi_slopes), ("blocksparse_params", blocksparse_params)):
            if option is not None:
                raise ModelError(
                    f"attention layer {prefix or '(without prefix)'}: got {name}, which is not supported, "
                    f"expected none. Leave {name} out, or serve the model through another implementation."
                )
        if per_layer_sliding_window is not None and per_layer_sliding_window < 1:
            raise ModelError(
                f"per_layer_sliding_window: got {per_layer_sliding_window}, expected at least 1. "
                "Leave it out for a layer that sees everything."
            )
        super().__init__(
            AttentionSpec(
                num_heads=num_heads,
                num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
                head_size=head_size,
                scale=float(scale),
                window=per_layer_sliding_window,
                softcap=float(logits_soft_cap) if logits_soft_cap else None,
            )
        )
        self.prefix = prefix
        self.group_index = 0
        """Its cache group among the model's; set when loading has found all layers."""

    def cache_spec(self) -> CacheSpec:
        """What this layer keeps of a sequence."""
        spec = self.spec
        if spec.window is None:
            return FullAttentionSpec(spec.num_kv_heads, spec.head_size, spec.head_size)
        return SlidingWindowSpec(spec.num_kv_heads, spec.head_size, spec.head_size, spec.window)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor | None,
        attn_metadata: AttentionMetadata,
        attn_type: str = AttentionType.DECODER,
        rotation: Rotation | None = None,
    ) -> torch.Tensor:
        """Attend; with a cache, first store `key` and `value` in it.

        Args:
            query: `(num_tokens, num_heads * head_size)`, or the same with the heads as an axis.
            key: `(num_tokens, num_kv_heads * head_size)`, likewise.
            value: As `key`.
            kv_cache: This layer's `(2, num_blocks, block_size, num_kv_heads, head_size)`. `None` or empty:
                the given rows are all there is (profiling), and nothing is written.
            attn_metadata: The step's batch.
            attn_type: See `AttentionType`.
            rotation: How queries and keys, which then have the heads as an axis, are rotated first. With a cache that
                takes no memory access of its own.

        Returns:
            `(num_tokens, num_heads * head_size)`.

        Raises:
            ModelError: `attn_type` is not supported.
        """
        num_tokens = query.shape[0]
        backend = self._backend_for(query)
        if attn_type == AttentionType.DECODER and kv_cache is not None and kv_cache.numel() > 0:
            batch = attn_metadata.of_group(self.group_index)
            if rotation is None:
                write_kv(key, value, kv_cache, batch.slot_mapping)
            else:
                query = rotate_and_write_kv(query, key, value, rotation, kv_cache, batch.slot_mapping)
            # Flat or not: with a cache at hand, backends know the head size.
            out = backend.paged(query, kv_cache, batch, self.spec)
        elif attn_type in (AttentionType.DECODER, AttentionType.ENCODER, AttentionType.ENCODER_ONLY):
            q = query.reshape(num_tokens, self.num_heads, self.head_size)
            k = key.reshape(num_tokens, self.num_kv_heads, self.head_size)
            v = value.reshape(num_tokens, self.num_kv_heads, self.head_size)
            if rotation is not None:
                q, k = rotary_embedding(q, k, *rotation)
            causal = attn_type == AttentionType.DECODER
            out = backend.varlen(q, k, v, attn_metadata.cu_seqlens_q, self.spec, causal=causal)
        else:
            raise ModelError(
                f"attention type of layer {self.prefix or '(without prefix)'}: got {attn_type!r}, expected one of "
                f"{AttentionType.DECODER.value!r}, {AttentionType.ENCODER.value!r}, "
                f"{AttentionType.ENCODER_ONLY.value!r}. Change attn_type; cross-attention is not supported."
            )
        return out if out.dim() == 2 else out.reshape(num_tokens, self.num_heads * self.head_size)


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
    """

    def __init__(self, num_heads: int, head_size: int, scale: float, num_kv_heads: int | None = None) -> None:
        super().__init__(
            AttentionSpec(
                num_heads=num_heads,
                num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
                head_size=head_size,
                scale=float(scale),
            )
        )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor | Sequence[int] | None = None,
        key_lens: torch.Tensor | Sequence[int] | None = None,
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

        Returns:
            The shape of `query`.
        """
        num_rows = query.shape[:-1].numel()
        q = query.reshape(num_rows, self.num_heads, self.head_size)
        k = key.reshape(num_rows, self.num_kv_heads, self.head_size)
        v = value.reshape(num_rows, self.num_kv_heads, self.head_size)
        if cu_seqlens is None:
            length = query.shape[-2]
            starts = torch.arange(0, num_rows + 1, max(length, 1), dtype=torch.int32, device=query.device)
        else:
            starts = _int32_tensor(cu_seqlens, query.device)
        lens = None if key_lens is None else _int32_tensor(key_lens, query.device)
        out = self._backend_for(q).varlen(q, k, v, starts, self.spec, causal=False, key_lens=lens)
        return out.reshape(query.shape)


def _int32_tensor(values: torch.Tensor | Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.int32, device=device)
