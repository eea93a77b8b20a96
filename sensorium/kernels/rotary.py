"""Rotary position embedding of queries and keys.

Source: Su et al. 2021, section 3.4.2; the "neox" layout rotates channel `i` with channel `i + rotary_dim / 2`
(`transformers` `apply_rotary_pos_emb`), the other layout (GPT-J) rotates neighbours `2 i` and `2 i + 1`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sensorium.kernels.attention import write_kv, write_kv_reference
from sensorium.kernels.gpu import on_gpu
from sensorium.kernels.native import DTYPE_CODES, native_for, token_rows


class Rotation(NamedTuple):
    """A step's rotation of queries and keys: the other arguments of `rotary_embedding`."""

    cos: torch.Tensor
    sin: torch.Tensor
    is_neox_style: bool = True
    rotary_dim: int | None = None


def rotary_embedding_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    is_neox_style: bool = True,
    rotary_dim: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the first `rotary_dim` channels of every head; the others pass through.

    Args:
        query: `(T, H, D)`.
        key: `(T, Hkv, D)`.
        cos: `(T, rotary_dim / 2)`, one row per token, float32 or the query's dtype.
        sin: As `cos`.
        is_neox_style: Whether halves are rotated against each other, rather than neighbours.
        rotary_dim: Rotated channels; `None` for all `D`.

    Returns:
        New tensors like `query` and `key`, computed in float32 and rounded once.
    """
    dim = query.shape[-1] if rotary_dim is None else rotary_dim
    c, s = cos.float()[:, None], sin.float()[:, None]
    return _rotate(query, c, s, dim, is_neox_style), _rotate(key, c, s, dim, is_neox_style)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dim: int, neox: bool) -> torch.Tensor:
    turned = x[..., :dim].float()
    if neox:
        first, second = turned.chunk(2, dim=-1)
        pair = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    else:
        first, second = turned[..., ::2], turned[..., 1::2]
        pair = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    return torch.cat((pair.to(x.dtype), x[..., dim:]), dim=-1)


def rotary_embedding(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    is_neox_style: bool = True,
    rotary_dim: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `rotary_embedding_reference`."""
    native = native_for(query)
    plain = key.dtype == query.dtype and cos.dtype == sin.dtype and cos.dtype in (query.dtype, torch.float32)
    if native is None or not plain:
        fused = _gpu_rotary_embedding if on_gpu(query) else rotary_embedding_reference
        return fused(query, key, cos, sin, is_neox_style, rotary_dim)
    query, key, cos, sin = token_rows(query), token_rows(key), cos.contiguous(), sin.contiguous()
    query_out = torch.empty_like(query, memory_format=torch.contiguous_format)
    key_out = torch.empty_like(key, memory_format=torch.contiguous_format)
    num_tokens, num_heads, head_size = query.shape
    native.rotary(
        *(query_out.data_ptr(), key_out.data_ptr(), query.data_ptr(), key.data_ptr()),
        *(cos.data_ptr(), sin.data_ptr(), num_tokens, num_heads, key.shape[1], head_size),
        *(head_size if rotary_dim is None else rotary_dim, query.stride(0), key.stride(0)),
        *(is_neox_style, DTYPE_CODES[query.dtype], DTYPE_CODES[cos.dtype], torch.get_num_threads()),
    )
    return query_out, key_out


def _gpu_rotary_embedding(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    is_neox_style: bool = True,
    rotary_dim: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    from sensorium.kernels.gpu.rotary import rotary_embedding

    return rotary_embedding(query, key, cos, sin, is_neox_style, rotary_dim)


def rotate_and_write_kv_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rotation: Rotation,
    keys: torch.Tensor,
    values: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """Write the rotated key `(T, Hkv, D)` and the value `(T, Hkv, Dv)` to the cache; returns the rotated query
    `(T, H, D)`.

    See `rotary_embedding_reference` and `attention.write_kv_reference`.
    """
    query, key = rotary_embedding_reference(query, key, *rotation)
    write_kv_reference(key, value, keys, values, slot_mapping, k_scale, v_scale)
    return query


def rotate_and_write_kv(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rotation: Rotation,
    keys: torch.Tensor,
    values: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """See `rotate_and_write_kv_reference`."""
    if on_gpu(query) and keys.shape == values.shape:
        from sensorium.kernels.gpu import rotary as gpu

        return gpu.rotate_and_write_kv(query, key, value, rotation, keys, values, slot_mapping, k_scale, v_scale)
    query, key = rotary_embedding(query, key, *rotation)
    write_kv(key, value, keys, values, slot_mapping, k_scale, v_scale)
    return query
