"""Attention over paged or flat keys and values, and writes to the paged cache.

The twins, and the conventions of shapes, are in `sensorium.kernels.attention`. Sequences of one query are for the
kernel that splits their keys over programs, the others for the one that makes tiles of queries. Each kernel reads the
lengths on the device and skips the other's sequences; the host only leaves out a launch that no sequence needs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sensorium.kernels.attention import AttentionRules, PagedBatch, cache_strides
from sensorium.kernels.gpu import gathered_attention
from sensorium.kernels.gpu.chaining import await_predecessor, chained
from sensorium.kernels.gpu.chunk_attention import attend_chunks
from sensorium.kernels.gpu.decode_attention import attend_decodes
from sensorium.kernels.gpu.fp8 import largest_fp8, within_fp8
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
    slot_stride,
    key_factor,
    value_factor,
    KEY_CELLS: tl.constexpr,
    VALUE_CELLS: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    """One program: one token. `HEAD_STRIDE` 0: a slot's heads are contiguous. `LARGEST`: see `within_fp8`."""
    await_predecessor(IS_CHAINED)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    cells = tl.arange(0, BLOCK)
    key_places, value_places = cells, cells
    if HEAD_STRIDE > 0:
        key_places = cells // KEY_SIZE * HEAD_STRIDE + cells % KEY_SIZE
        value_places = cells // VALUE_SIZE * HEAD_STRIDE + cells % VALUE_SIZE
    kept = within_fp8(tl.load(key + token * key_stride + cells, mask=cells < KEY_CELLS), key_factor, LARGEST)
    tl.store(keys + slot * slot_stride + key_places, kept.to(keys.dtype.element_ty), mask=cells < KEY_CELLS)
    kept = within_fp8(tl.load(value + token * value_stride + cells, mask=cells < VALUE_CELLS), value_factor, LARGEST)
    tl.store(values + slot * slot_stride + value_places, kept.to(values.dtype.element_ty), mask=cells < VALUE_CELLS)


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """See `attention.write_kv_reference`."""
    if not len(key):
        return
    slot_stride, head_stride = cache_strides(keys)
    assert cache_strides(values) == (slot_stride, head_stride)
    num_kv_heads, key_size = keys.shape[2:]
    value_size = values.shape[3]
    key, value = token_rows(key), token_rows(value)
    _write_kv[(len(key),)](
        *(key, value, keys, values, slot_mapping),
        *(key.stride(0), value.stride(0), slot_stride, 1.0 / k_scale, 1.0 / v_scale),
        KEY_CELLS=num_kv_heads * key_size,
        VALUE_CELLS=num_kv_heads * value_size,
        KEY_SIZE=key_size,
        VALUE_SIZE=value_size,
        HEAD_STRIDE=0 if head_stride == key_size == value_size else head_stride,
        BLOCK=triton.next_power_of_2(num_kv_heads * max(key_size, value_size)),
        LARGEST=largest_fp8(keys.dtype),
        **chained(key.device),
    )


def paged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: PagedBatch,
    rules: AttentionRules,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `attention.paged_attention_reference`."""
    head_size, value_size = keys.shape[3], values.shape[3]
    flat = token_rows(query).flatten(1)
    out = flat.new_empty(len(flat), flat.shape[1] // head_size * value_size)
    has_chunks = batch.max_seqlen_q > 1
    # Only `attend_chunks` handles windows and chunks of queries that are not among their keys.
    has_decodes = batch.has_decodes and (rules.causal or (rules.window is None and rules.chunk is None))
    if has_decodes and len(flat):
        attend_decodes(out, flat, keys, values, batch, rules, sinks)
    least_queries = 2 if has_decodes else 1
    if _can_be_gathered(flat, keys, values, batch, rules, sinks):
        gathered_attention.attend_gathered(
            *(out, flat, keys, values, batch.block_table, batch.cu_seqlens_q, batch.seq_lens),
            num_tiles=gathered_attention.num_tiles_of(batch.seq_lens_host),
            least_queries=least_queries,
            scale=rules.scale * rules.k_scale,
            value_scale=rules.v_scale,
        )
    elif has_chunks or not has_decodes:
        attend_chunks(
            *(out, flat, keys, values, batch.cu_seqlens_q, rules),
            strides=(cache_strides(keys), cache_strides(values)),
            least_queries=least_queries,
            key_lens=batch.seq_lens,
            table=batch.block_table,
            sinks=sinks,
            row_spans=batch.row_spans,
        )
    return out if query.dim() == 2 else out.view(*query.shape[:2], value_size)


def _can_be_gathered(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: PagedBatch,
    rules: AttentionRules,
    sinks: torch.Tensor | None,
) -> bool:
    """Whether the host knows the lengths, no rule but causality applies, and gathering pays."""
    if batch.is_recorded or batch.max_seqlen_q <= 1 or keys.shape != values.shape:
        return False
    if not rules.is_plain or sinks is not None or batch.row_spans is not None:
        return False
    num_kv_heads, head_size = keys.shape[2:]
    group = query.shape[1] // (num_kv_heads * head_size)
    return gathered_attention.fits(query, head_size, group, batch.seq_lens_host)


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    rules: AttentionRules,
    *,
    key_lens: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    row_spans: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `attention.varlen_attention_reference`."""
    query, key, value = token_rows(query), token_rows(key), token_rows(value)
    out = query.new_empty(*query.shape[:2], value.shape[2])
    attend_chunks(
        *(out.flatten(1), query.flatten(1), key, value, cu_seqlens, rules),
        strides=((key.stride(0), key.shape[2]), (value.stride(0), value.shape[2])),
        key_lens=key_lens,
        sinks=sinks,
        row_spans=row_spans,
    )
    return out
