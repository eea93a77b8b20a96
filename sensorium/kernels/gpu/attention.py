"""Attention over paged and over flat keys and values, and the writing of the paged cache.

The twins, and the conventions of shapes, are in `sensorium.kernels.attention`. Sequences of one query go to the kernel
that splits their keys over programs, the others to the one that makes tiles of queries. Which is which, the kernels
see on the device, and pass over the others' sequences; the host only says if one of them isn't needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from sensorium.kernels.gpu import gathered_attention
from sensorium.kernels.gpu.chaining import await_predecessor, chained
from sensorium.kernels.gpu.chunk_attention import attend_chunks
from sensorium.kernels.gpu.decode_attention import attend_decodes
from sensorium.kernels.native import token_rows


@triton.jit
def _write_kv(
    key,
    value,
    keys,
    values,
    slot_mapping,
    key_stride,
    value_stride,
    slot_size,
    BLOCK: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    """One token."""
    await_predecessor(IS_CHAINED)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    cells = tl.arange(0, BLOCK)
    is_cell = cells < slot_size
    tl.store(
        keys + slot * slot_size + cells,
        tl.load(key + token * key_stride + cells, mask=is_cell).to(keys.dtype.element_ty),
        mask=is_cell,
    )
    tl.store(
        values + slot * slot_size + cells,
        tl.load(value + token * value_stride + cells, mask=is_cell).to(values.dtype.element_ty),
        mask=is_cell,
    )


def write_kv(key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """See `attention.write_kv_reference`."""
    if not len(key):
        return
    keys, values = kv_cache[0], kv_cache[1]
    slot_size = keys.shape[2] * keys.shape[3]
    key, value = token_rows(key), token_rows(value)
    _write_kv[(len(key),)](
        *(key, value, keys, values, slot_mapping),
        *(key.stride(0), value.stride(0), slot_size),
        BLOCK=triton.next_power_of_2(slot_size),
        **chained(key.device),
    )


def paged_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    has_decodes: bool = True,
    has_chunks: bool = True,
    key_lens: Sequence[int] | None = None,
) -> torch.Tensor:
    """See `attention.paged_attention_reference`.

    Args as there, and `has_decodes`: whether a sequence may have exactly one query; `has_chunks`: whether one may have
    more; `key_lens`: `seq_lens` on the host, where they are known there.
    """
    block_size, num_kv_heads, head_size = kv_cache.shape[2:]
    flat = token_rows(query).flatten(1)
    out = torch.empty_like(flat, memory_format=torch.contiguous_format)
    if has_decodes and len(flat):
        attend_decodes(
            *(out, flat, kv_cache, block_table, cu_seqlens_q, seq_lens),
            is_mixed=has_chunks,
            scale=scale,
            window=window,
            softcap=softcap,
        )
    least_queries = 2 if has_decodes else 1
    if not has_chunks:
        return out.view(query.shape)
    group = flat.shape[1] // (num_kv_heads * head_size)
    if (
        window is None
        and softcap is None
        and key_lens is not None
        and gathered_attention.fits(flat, head_size, group, key_lens)
    ):
        gathered_attention.attend_gathered(
            *(out, flat, kv_cache, block_table, cu_seqlens_q, seq_lens),
            num_tiles=gathered_attention.num_tiles_of(key_lens),
            least_queries=least_queries,
            scale=scale,
        )
    else:
        attend_chunks(
            *(out, flat, kv_cache[0], kv_cache[1], (num_kv_heads, head_size), cu_seqlens_q),
            strides=(num_kv_heads * head_size,) * 2,
            least_queries=least_queries,
            key_lens=seq_lens,
            table=block_table,
            block_size=block_size,
            causal=True,
            scale=scale,
            window=window,
            softcap=softcap,
        )
    return out.view(query.shape)


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    key_lens: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """See `attention.varlen_attention_reference`."""
    num_kv_heads, head_size = key.shape[1:]
    flat, key, value = (token_rows(x).flatten(1) for x in (query, key, value))
    out = torch.empty_like(flat, memory_format=torch.contiguous_format)
    attend_chunks(
        *(out, flat, key, value, (num_kv_heads, head_size), cu_seqlens),
        strides=(key.stride(0), value.stride(0)),
        least_queries=1,
        key_lens=key_lens,
        table=None,
        block_size=0,
        causal=causal,
        scale=scale,
        window=window,
        softcap=softcap,
    )
    return out.view(query.shape)
