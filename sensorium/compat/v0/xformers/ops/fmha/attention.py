"""Attention of encoders, by Sensorium's layer."""

from __future__ import annotations

import torch

from sensorium.attention import MultiHeadAttention
from sensorium.compat.v0.xformers.ops.fmha.attn_bias import BlockDiagonalMask, LowerTriangularMask
from sensorium.errors import ModelError

__all__ = ["memory_efficient_attention"]


def memory_efficient_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: BlockDiagonalMask | LowerTriangularMask | torch.Tensor | None = None,
    p: float = 0.0,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of heads `(batch, rows, heads, head_size)`, or without the heads' axis.

    Raises:
        ModelError: `p` is not 0, or queries and keys of a block are not the same rows.
    """
    if p:
        raise ModelError(f"dropout of memory_efficient_attention: got {p}, expected 0. Leave p out.")
    if query.dim() == 3:
        query, key, value = query.unsqueeze(2), key.unsqueeze(2), value.unsqueeze(2)
        return memory_efficient_attention(query, key, value, attn_bias, scale=scale).squeeze(2)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(attn_bias, torch.Tensor) or query.shape[1] != key.shape[1]:
        return _with_bias(query, key, value, attn_bias, scale)
    batch, rows, heads, size = query.shape
    causal = isinstance(attn_bias, LowerTriangularMask)
    layer = MultiHeadAttention(heads, size, scale, key.shape[2], head_size_v=value.shape[3], causal=causal)
    if isinstance(attn_bias, BlockDiagonalMask):
        flat = [each.flatten(0, 1).flatten(1) for each in (query, key, value)]
        out: torch.Tensor = layer(*flat, cu_seqlens=attn_bias.starts_of(batch * rows))
    else:
        out = layer(query.flatten(2), key.flatten(2), value.flatten(2))
    return out.view(batch, rows, heads, value.shape[3])


def _with_bias(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: object, scale: float) -> torch.Tensor:
    """With scores added, or with other rows as keys: torch's own."""
    if bias is not None and not isinstance(bias, torch.Tensor):
        raise ModelError(
            f"attn_bias of memory_efficient_attention: got {type(bias).__name__} for {query.shape[1]} queries and "
            f"{key.shape[1]} keys, expected as many of both. Give the mask as a tensor."
        )
    q, k, v = (each.transpose(1, 2) for each in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return out.transpose(1, 2)
