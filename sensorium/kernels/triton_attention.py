"""Attention over paged and over flat keys and values as one Triton kernel, and the writing of the paged cache.

The twins, and the conventions of shapes, are in `attention.py`. Nothing here waits for the device, and no launch
depends on values that lie there, so a step can be captured in a CUDA graph.

How rows become programs. A *tile* is `BLOCK_Q` queries of one sequence with the `GROUP` query heads that share a
key/value head: up to `BLOCK_M` rows that read the same keys. Sequence `i` starts at tile
`cu_seqlens[i] // BLOCK_Q + i`, which leaves room for its last, partly filled tile without knowing any length. With
`BLOCK_Q = 4` and lengths 3, 9, 1 (`cu_seqlens` 0, 3, 12, 13) the sequences start at tiles 0, 1, 5 and the grid has
`13 // 4 + 3 = 6` tiles, of which tile 4 finds nothing to do.

Source: the online softmax of FlashAttention-2 (https://arxiv.org/abs/2307.08691), section 3.1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _attend(
    out,
    query,
    key,
    value,
    block_table,
    cu_seqlens,
    key_lens,
    num_seqs,
    scale,
    window,
    softcap,
    out_stride,
    query_stride,
    key_stride,
    value_stride,
    table_stride,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_KEY_LENS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """One tile and one key/value head. `BLOCK_SIZE` 0: keys lie flat, beside their queries."""
    tile, kv_head = tl.program_id(0), tl.program_id(1)

    # The last sequence whose first tile is not behind this one.
    seq, behind = 0, num_seqs
    while behind - seq > 1:
        middle = (seq + behind) // 2
        if tl.load(cu_seqlens + middle) // BLOCK_Q + middle <= tile:
            seq = middle
        else:
            behind = middle
    first_row = tl.load(cu_seqlens + seq)
    num_queries = tl.load(cu_seqlens + seq + 1) - first_row
    first_query = (tile - (first_row // BLOCK_Q + seq)) * BLOCK_Q
    if first_query >= num_queries:
        return
    num_keys = num_queries
    if HAS_KEY_LENS:
        num_keys = tl.load(key_lens + seq)

    rows, channels = tl.arange(0, BLOCK_M), tl.arange(0, HEAD_PAD)
    queries = first_query + rows // GROUP
    is_row = (rows < BLOCK_Q * GROUP) & (queries < num_queries)
    is_channel = channels < HEAD_SIZE
    heads = kv_head * GROUP + rows % GROUP
    row_index = (first_row + queries).to(tl.int64)
    is_cell = is_row[:, None] & is_channel[None, :]
    cells = heads[:, None] * HEAD_SIZE + channels[None, :]
    q = tl.load(query + row_index[:, None] * query_stride + cells, mask=is_cell, other=0.0)

    # A causal query is one of the last `num_queries` of the keys' positions.
    shift = num_keys - num_queries if IS_CAUSAL else 0
    positions = queries + shift
    begin, end = 0, num_keys
    if IS_CAUSAL:
        end = tl.minimum(num_keys, first_query + BLOCK_Q + shift)
    if HAS_WINDOW:
        begin = tl.maximum(first_query + shift - window + 1, 0) // BLOCK_N * BLOCK_N
        if not IS_CAUSAL:
            end = tl.minimum(num_keys, first_query + BLOCK_Q + window)

    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_PAD], tl.float32)
    for start in range(begin, end, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        is_token = tokens < end
        if BLOCK_SIZE > 0:
            blocks = tl.load(block_table + seq * table_stride + tokens // BLOCK_SIZE, mask=is_token, other=0)
            places = blocks.to(tl.int64) * BLOCK_SIZE + tokens % BLOCK_SIZE
        else:
            places = (first_row + tokens).to(tl.int64)
        kv_cells = kv_head * HEAD_SIZE + channels[None, :]
        is_kv = is_token[:, None] & is_channel[None, :]
        k = tl.load(key + places[:, None] * key_stride + kv_cells, mask=is_kv, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if HAS_SOFTCAP:
            # tanh(x) = 1 - 2 / (exp(2x) + 1), which is right at both ends.
            scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
        seen = is_row[:, None] & is_token[None, :]
        distance = positions[:, None] - tokens[None, :]
        if IS_CAUSAL:
            seen = seen & (distance >= 0)
        if HAS_WINDOW:
            seen = seen & (distance < window) & (distance > -window)
        scores = tl.where(seen, scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        # A row that has seen nothing yet: any finite number keeps infinities apart.
        anchor = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights = tl.exp(scores - anchor[:, None])
        fade = tl.exp(best - anchor)
        total = total * fade + tl.sum(weights, 1)
        v = tl.load(value + places[:, None] * value_stride + kv_cells, mask=is_kv, other=0.0)
        acc = acc * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        best = new_best

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + row_index[:, None] * out_stride + cells, acc.to(out.dtype.element_ty), mask=is_cell)


@triton.jit
def _write_kv(key, value, keys, values, slot_mapping, key_stride, value_stride, slot_size, BLOCK: tl.constexpr):
    """One token."""
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
    key, value = _flat(key), _flat(value)
    _write_kv[(len(key),)](
        *(key, value, keys, values, slot_mapping),
        *(key.stride(0), value.stride(0), slot_size),
        BLOCK=triton.next_power_of_2(slot_size),
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
    max_seqlen_q: int,
) -> torch.Tensor:
    """See `attention.paged_attention_reference`. `max_seqlen_q`: the longest query; it only chooses the tile's size."""
    block_size, num_kv_heads, head_size = kv_cache.shape[2:]
    return _launch(
        *(query, kv_cache[0], kv_cache[1]),
        (num_kv_heads, head_size),
        cu_seqlens_q,
        strides=(num_kv_heads * head_size,) * 2,
        key_lens=seq_lens,
        table=block_table,
        block_size=block_size,
        causal=True,
        scale=scale,
        window=window,
        softcap=softcap,
        max_queries=max_seqlen_q,
    )


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
    key, value = _flat(key), _flat(value)
    return _launch(
        *(query, key, value),
        (num_kv_heads, head_size),
        cu_seqlens,
        strides=(key.stride(0), value.stride(0)),
        key_lens=key_lens,
        table=None,
        block_size=0,
        causal=causal,
        scale=scale,
        window=window,
        softcap=softcap,
        max_queries=len(query),
    )


def _flat(x: torch.Tensor) -> torch.Tensor:
    """`(T, H, D)` or `(T, H * D)` as `(T, H * D)` with channels side by side, copied only if need be."""
    if x.dim() == 3 and (x.stride(2) != 1 or x.stride(1) != x.shape[2]):
        x = x.contiguous()
    if x.dim() == 2 and x.stride(1) != 1:
        x = x.contiguous()
    return x.flatten(1)


def _launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_shape: tuple[int, int],
    cu_seqlens: torch.Tensor,
    *,
    strides: tuple[int, int],
    key_lens: torch.Tensor | None,
    table: torch.Tensor | None,
    block_size: int,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    max_queries: int,
) -> torch.Tensor:
    num_kv_heads, head_size = kv_shape
    flat = _flat(query)
    out = torch.empty_like(flat, memory_format=torch.contiguous_format)
    num_rows, num_seqs = len(flat), len(cu_seqlens) - 1
    if not num_rows:
        return out.view(query.shape)
    group = flat.shape[1] // (num_kv_heads * head_size)
    is_wide = flat.dtype == torch.float32 or head_size > 128
    block_m = max(triton.next_power_of_2(group), 16 if max_queries == 1 or is_wide else 64)
    block_q = block_m // group
    _attend[(num_rows // block_q + num_seqs, num_kv_heads)](
        *(out, flat, key, value, cu_seqlens if table is None else table, cu_seqlens),
        *(cu_seqlens if key_lens is None else key_lens, num_seqs, scale, window or 0, softcap or 1.0),
        *(out.stride(0), flat.stride(0), *strides, 0 if table is None else table.stride(0)),
        GROUP=group,
        HEAD_SIZE=head_size,
        HEAD_PAD=max(triton.next_power_of_2(head_size), 16),
        BLOCK_Q=block_q,
        BLOCK_M=block_m,
        BLOCK_N=32 if is_wide else 64,
        BLOCK_SIZE=block_size,
        HAS_KEY_LENS=key_lens is not None,
        IS_CAUSAL=causal,
        HAS_WINDOW=window is not None,
        HAS_SOFTCAP=softcap is not None,
        num_warps=4,
        num_stages=2,
    )
    return out.view(query.shape)
