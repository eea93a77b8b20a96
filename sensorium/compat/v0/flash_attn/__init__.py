"""Names of `flash_attn` that towers use, by Sensorium's attention."""

from __future__ import annotations

import torch

from sensorium.attention import MultiHeadAttention
from sensorium.errors import ModelError

__all__ = ["flash_attn_func", "flash_attn_varlen_func"]


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Attention of `(batch, rows, heads, head_size)` within each of the batch.

    Raises:
        ModelError: `dropout_p` is not 0, or there are more keys than queries.
    """
    if q.shape[1] != k.shape[1]:
        raise ModelError(f"rows of flash_attn_func: got {k.shape[1]} keys, expected {q.shape[1]}, as of queries.")
    layer = _layer(q, k, v, dropout_p, softmax_scale, causal)
    out: torch.Tensor = layer(q.flatten(2), k.flatten(2), v.flatten(2))
    return out.view(*q.shape[:3], v.shape[3])


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Attention of `(rows, heads, head_size)` within sequences that begin at `cu_seqlens_q`.

    Raises:
        ModelError: `dropout_p` is not 0, or keys are of other sequences than queries.
    """
    if cu_seqlens_k is not cu_seqlens_q and not torch.equal(cu_seqlens_q, cu_seqlens_k):
        raise ModelError("cu_seqlens_k of flash_attn_varlen_func: got others than cu_seqlens_q, expected the same.")
    layer = _layer(q, k, v, dropout_p, softmax_scale, causal)
    out: torch.Tensor = layer(q.flatten(1), k.flatten(1), v.flatten(1), cu_seqlens=cu_seqlens_q)
    return out.view(*q.shape[:2], v.shape[2])


def _layer(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float, scale: float | None, causal: bool
) -> MultiHeadAttention:
    if dropout_p:
        raise ModelError(f"dropout_p: got {dropout_p}, expected 0. Leave it out.")
    size = q.shape[-1]
    return MultiHeadAttention(
        q.shape[-2],
        size,
        size**-0.5 if scale is None else scale,
        k.shape[-2],
        head_size_v=v.shape[-1],
        causal=causal,
    )
