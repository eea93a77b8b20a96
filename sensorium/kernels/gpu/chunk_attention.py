"""Attention of sequences with many queries: tiles of queries over the keys of a paged cache, or over flat keys.

How rows are divided into programs: a *tile* is `BLOCK_Q` queries of one sequence with the `GROUP` query heads that
share a key/value head: up to `BLOCK_M` rows that read the same keys. Sequence `i` starts at tile
`cu_seqlens[i] // BLOCK_Q + i`, which leaves room for each sequence's last, partly filled tile whatever the lengths.
With `BLOCK_Q = 4` and lengths 3, 9, 1 (`cu_seqlens` 0, 3, 12, 13) the sequences start at tiles 0, 1, 5 and the grid has
`13 // 4 + 3 = 6` tiles, of which tile 4 has nothing to do.

A tile's keys come in blocks of `BLOCK_N`. Most blocks are seen by every query of the tile and need no mask; only those
at the diagonal, at a window's or chunk's edge, in spans and at the end do. Channels are split into one or two parts,
each a power of two (`80 = 64 + 16`), so that little padding is multiplied.

Source: FlashAttention-2 (https://arxiv.org/abs/2307.08691), section 3.1.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sensorium.kernels.attention import AttentionRules
from sensorium.kernels.gpu.chaining import await_predecessor, chained
from sensorium.kernels.gpu.decode_attention import score_constants

_SEARCHED = 128
"""Sequences that are read together to find a tile's."""


class ChunkConfig(NamedTuple):
    """The shape of tiles."""

    block_m: int
    """Rows of a tile: queries times the heads that share a key."""
    block_n: int
    """Keys of a block."""
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    """A thread's registers, limited so that another program fits on the multiprocessor; None: the compiler's choice."""


@cache
def chunk_config(dtype: torch.dtype, head_size: int, rows_per_seq: int) -> ChunkConfig:
    """The measured choice. `rows_per_seq`: how many rows, queries times the heads that share a key, a sequence has.

    Never a single stage, for which Triton 3.6 generates wrong code for Hopper's matrix units.
    """
    if dtype == torch.float32:
        return ChunkConfig(16, 32, 4, 2)
    if rows_per_seq <= 16:
        return ChunkConfig(16, 64, 4, 2)
    if head_size > 192:
        return ChunkConfig(64, 64, 4, 2)
    if rows_per_seq <= 96:
        return ChunkConfig(64, 32, 4, 3)
    if rows_per_seq <= 2048:
        return ChunkConfig(64, 64, 4, 3)
    return ChunkConfig(128, 64, 4, 3) if head_size <= 96 else ChunkConfig(128, 64, 8, 3, 128)


@triton.jit
def _load_rows(base, places, channels, IS_MASKED: tl.constexpr, is_token, HEAD_SIZE: tl.constexpr, END: tl.constexpr):
    """`(BLOCK_N, channels)`; rows of masked tokens and channels past the head's end are 0."""
    pointers = base + places[:, None] + channels[None, :]
    if END > HEAD_SIZE:
        is_cell = (channels < HEAD_SIZE)[None, :]
        if IS_MASKED:
            is_cell = is_cell & is_token[:, None]
        cells = tl.load(pointers, mask=is_cell, other=0.0)
    elif IS_MASKED:
        cells = tl.load(pointers, mask=is_token[:, None], other=0.0)
    else:
        cells = tl.load(pointers)
    return cells


@triton.jit
def _attend_blocks(
    best,
    total,
    acc_a,
    acc_b,
    begin,
    end,
    q_a,
    q_b,
    positions,
    key,
    value,
    table,
    first_key,
    num_keys,
    span_begin,
    span_end,
    scale,
    window,
    softcap,
    chunk,
    key_stride,
    value_stride,
    HEAD_SIZE: tl.constexpr,
    HEAD_A: tl.constexpr,
    HEAD_B: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_A: tl.constexpr,
    VALUE_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    IS_ONE_STRIDE: tl.constexpr,
    IS_MASKED: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CHUNK: tl.constexpr,
    HAS_SPANS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Attend to the keys `begin:end`, block by block. `BLOCK_SIZE` 0: they are flat."""
    channels_a = tl.arange(0, HEAD_A)
    channels_b = HEAD_A + tl.arange(0, 16 if HEAD_B == 0 else HEAD_B)
    parts_a = tl.arange(0, VALUE_A)
    parts_b = VALUE_A + tl.arange(0, 16 if VALUE_B == 0 else VALUE_B)
    for start in range(begin, end, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        is_token = tokens < num_keys
        if HAS_WINDOW or HAS_CHUNK:
            is_token = is_token & (tokens >= first_key)
        if BLOCK_SIZE > 0:
            if IS_MASKED:
                blocks = tl.load(table + tokens // BLOCK_SIZE, mask=is_token, other=0)
            else:
                blocks = tl.load(table + tokens // BLOCK_SIZE)
            places = blocks.to(tl.int64) * BLOCK_SIZE + tokens % BLOCK_SIZE
        else:
            places = tokens.to(tl.int64)
        key_places = places * key_stride
        value_places = key_places
        if not IS_ONE_STRIDE:
            value_places = places * value_stride
        # The casts are exact: a cache may hold fewer bits.
        k_a = _load_rows(key, key_places, channels_a, IS_MASKED, is_token, HEAD_SIZE, HEAD_A).to(q_a.dtype)
        scores = tl.dot(q_a, tl.trans(k_a), input_precision="ieee")
        if HEAD_B > 0:
            k_b = _load_rows(key, key_places, channels_b, IS_MASKED, is_token, HEAD_SIZE, HEAD_A + HEAD_B)
            scores = tl.dot(q_b, tl.trans(k_b.to(q_b.dtype)), scores, input_precision="ieee")
        scores = scores * scale
        if HAS_SOFTCAP:
            # tanh(x) = 1 - 2 / (exp(2x) + 1), which is exact at both ends.
            scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores) + 1.0))
        if IS_MASKED:
            seen = is_token[None, :]
            distance = positions[:, None] - tokens[None, :]
            if IS_CAUSAL:
                seen = seen & (distance >= 0)
            if HAS_WINDOW:
                seen = seen & (distance < window) & (distance > -window)
            if HAS_CHUNK:
                seen = seen & ((positions // chunk)[:, None] == (tokens // chunk)[None, :])
            if HAS_SPANS:
                is_inside = (tokens[None, :] >= span_begin[:, None]) & (tokens[None, :] < span_end[:, None])
                seen = seen | (is_inside & is_token[None, :])
            scores = tl.where(seen, scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        anchor = new_best
        if IS_MASKED:
            # For a row that has seen no key yet, any finite number avoids subtracting infinities.
            anchor = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights = tl.exp2(scores - anchor[:, None])
        fade = tl.exp2(best - anchor)
        total = total * fade + tl.sum(weights, 1)
        v_a = _load_rows(value, value_places, parts_a, IS_MASKED, is_token, VALUE_SIZE, VALUE_A).to(q_a.dtype)
        narrow = weights.to(v_a.dtype)
        acc_a = tl.dot(narrow, v_a, acc_a * fade[:, None], input_precision="ieee")
        if VALUE_B > 0:
            v_b = _load_rows(value, value_places, parts_b, IS_MASKED, is_token, VALUE_SIZE, VALUE_A + VALUE_B)
            acc_b = tl.dot(narrow, v_b.to(q_a.dtype), acc_b * fade[:, None], input_precision="ieee")
        best = new_best
    return best, total, acc_a, acc_b


@triton.jit
def sequence_of_tile(cu_seqlens, tile, num_seqs, BLOCK_Q: tl.constexpr, SEARCHED: tl.constexpr):
    """The last sequence whose first tile is this one or an earlier one."""
    num_begun = 0
    for start in range(0, num_seqs, SEARCHED):
        those = start + tl.arange(0, SEARCHED)
        starts = tl.load(cu_seqlens + those, mask=those < num_seqs, other=0)
        num_begun += tl.sum(((starts // BLOCK_Q + those <= tile) & (those < num_seqs)).to(tl.int32), 0)
    return num_begun - 1


@triton.jit
def _load_queries(sources, is_row, HEAD_SIZE: tl.constexpr, HEAD_A: tl.constexpr, HEAD_B: tl.constexpr):
    """The two parts of each row's channels; without a second part, the first is returned twice."""
    channels_a, channels_b = tl.arange(0, HEAD_A), HEAD_A + tl.arange(0, 16 if HEAD_B == 0 else HEAD_B)
    is_cell_a = is_row[:, None] & (channels_a < HEAD_SIZE)[None, :]
    is_cell_b = is_row[:, None] & (channels_b < HEAD_SIZE)[None, :]
    q_a = tl.load(sources[:, None] + channels_a[None, :], mask=is_cell_a, other=0.0)
    q_b = q_a
    if HEAD_B > 0:
        q_b = tl.load(sources[:, None] + channels_b[None, :], mask=is_cell_b, other=0.0)
    return q_a, q_b


@triton.jit
def _store_rows(
    targets, is_row, rows_a, rows_b, VALUE_SIZE: tl.constexpr, VALUE_A: tl.constexpr, VALUE_B: tl.constexpr
):
    """Write the two parts of each row's values."""
    parts_a = tl.arange(0, VALUE_A)
    is_cell_a = is_row[:, None] & (parts_a < VALUE_SIZE)[None, :]
    tl.store(targets[:, None] + parts_a[None, :], rows_a.to(targets.dtype.element_ty), mask=is_cell_a)
    if VALUE_B > 0:
        parts_b = VALUE_A + tl.arange(0, VALUE_B)
        is_cell_b = is_row[:, None] & (parts_b < VALUE_SIZE)[None, :]
        tl.store(targets[:, None] + parts_b[None, :], rows_b.to(targets.dtype.element_ty), mask=is_cell_b)


@triton.jit
def _seen_keys(
    first_position,
    last_position,
    num_keys,
    window,
    chunk,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CHUNK: tl.constexpr,
):
    """The ranges of keys that queries from a first to a last position see: some of them see `begin` to `end`, all of
    them `open_begin` to `open_end`.
    """
    begin, end, open_begin, open_end = num_keys * 0, num_keys, num_keys * 0, num_keys
    if IS_CAUSAL:
        end = tl.minimum(num_keys, last_position + 1)
        open_end = tl.minimum(num_keys, first_position + 1)
    if HAS_WINDOW:
        begin = tl.maximum(first_position - window + 1, 0)
        open_begin = tl.maximum(last_position - window + 1, 0)
        if not IS_CAUSAL:
            end = tl.minimum(num_keys, last_position + window)
            open_end = tl.minimum(num_keys, first_position + window)
    if HAS_CHUNK:
        begin = tl.maximum(begin, first_position // chunk * chunk)
        open_begin = tl.maximum(open_begin, last_position // chunk * chunk)
        end = tl.minimum(end, (last_position // chunk + 1) * chunk)
        open_end = tl.minimum(open_end, (first_position // chunk + 1) * chunk)
    return begin, end, open_begin, open_end


@triton.jit
def _with_spans(begins, ends, is_row, positions, begin, end, num_keys):
    """The span of each query, and the range `[begin, end)` widened by the spans."""
    # Only spans around their query apply; the others become empty.
    span_end = tl.load(ends, mask=is_row, other=0)
    span_begin = tl.load(begins, mask=(span_end > positions) & is_row, other=num_keys)
    begin = tl.minimum(begin, tl.min(span_begin, 0))
    return span_begin, span_end, begin, tl.minimum(tl.maximum(end, tl.max(span_end, 0)), num_keys)


@triton.jit(do_not_specialize=["num_seqs", "least_queries", "window", "chunk", "table_stride"])
def _attend(
    out,
    query,
    key,
    value,
    block_table,
    cu_seqlens,
    key_lens,
    sinks,
    span_begins,
    span_ends,
    num_seqs,
    least_queries,
    scale,
    window,
    softcap,
    chunk,
    value_scale,
    out_stride,
    query_stride,
    key_stride,
    value_stride,
    table_stride,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_A: tl.constexpr,
    HEAD_B: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_A: tl.constexpr,
    VALUE_B: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    IS_ONE_STRIDE: tl.constexpr,
    SEARCHED: tl.constexpr,
    HAS_KEY_LENS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CHUNK: tl.constexpr,
    HAS_SPANS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    """One program: one tile and one key/value head. `scale` and `softcap` are such that weights are powers of two."""
    await_predecessor(IS_CHAINED)
    # Tiles at a sequence's end have the most keys: they run first, so that the last to run are short.
    kv_head, tile = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    seq = sequence_of_tile(cu_seqlens, tile, num_seqs, BLOCK_Q, SEARCHED)
    first_row = tl.load(cu_seqlens + seq)
    num_queries = tl.load(cu_seqlens + seq + 1) - first_row
    first_query = (tile - (first_row // BLOCK_Q + seq)) * BLOCK_Q
    if (first_query >= num_queries) | (num_queries < least_queries):
        return
    num_keys = num_queries
    if HAS_KEY_LENS:
        num_keys = tl.load(key_lens + seq)
    rows = tl.arange(0, BLOCK_M)
    queries = first_query + rows // GROUP
    is_row = (rows < BLOCK_Q * GROUP) & (queries < num_queries)
    heads = kv_head * GROUP + rows % GROUP
    row_index = (first_row + queries).to(tl.int64)
    sources = query + row_index * query_stride + heads * HEAD_SIZE
    q_a, q_b = _load_queries(sources, is_row, HEAD_SIZE, HEAD_A, HEAD_B)

    key += kv_head * HEAD_STRIDE
    value += kv_head * VALUE_STRIDE
    if BLOCK_SIZE == 0:
        key += first_row.to(tl.int64) * key_stride
        value += first_row.to(tl.int64) * value_stride
    table = block_table + tl.cast(seq, tl.int64) * table_stride

    # A causal query is one of the last `num_queries` of the keys' positions.
    first_position = first_query + (num_keys - num_queries if IS_CAUSAL else 0)
    positions = first_position + rows // GROUP
    last_position = tl.minimum(first_query + BLOCK_Q, num_queries) - 1 - first_query + first_position
    begin, end, open_begin, open_end = _seen_keys(
        first_position, last_position, num_keys, window, chunk, IS_CAUSAL, HAS_WINDOW, HAS_CHUNK
    )
    span_begin, span_end = positions, positions
    if HAS_SPANS:
        span_begin, span_end, begin, end = _with_spans(
            span_begins + row_index, span_ends + row_index, is_row, positions, begin, end, num_keys
        )
    if HAS_WINDOW or HAS_CHUNK:
        num_keys = end  # later keys are never read
    first_key = begin
    begin = begin // BLOCK_N * BLOCK_N
    open_end = open_end // BLOCK_N * BLOCK_N

    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        # The sink starts the softmax as a key of value 0.
        sink = tl.load(sinks + heads, mask=is_row, other=float("-inf")).to(tl.float32)
        best = sink * 1.4426950408889634  # log2(e)
        total = tl.where(sink > float("-inf"), 1.0, 0.0)
    acc_a = tl.zeros([BLOCK_M, VALUE_A], tl.float32)
    acc_b = tl.zeros([BLOCK_M, 16 if VALUE_B == 0 else VALUE_B], tl.float32)
    if HAS_WINDOW or HAS_CHUNK:
        open_begin = tl.cdiv(open_begin, BLOCK_N) * BLOCK_N
        open_begin = tl.minimum(open_begin, end)
        best, total, acc_a, acc_b = _attend_blocks(
            best, total, acc_a, acc_b, begin, open_begin, q_a, q_b, positions, key, value, table, first_key, num_keys,
            span_begin, span_end, scale, window, softcap, chunk, key_stride, value_stride,
            HEAD_SIZE, HEAD_A, HEAD_B, VALUE_SIZE, VALUE_A, VALUE_B, BLOCK_N, BLOCK_SIZE, IS_ONE_STRIDE, True,
            IS_CAUSAL, HAS_WINDOW, HAS_CHUNK, HAS_SPANS, HAS_SOFTCAP,
        )  # fmt: skip
    open_end = tl.maximum(open_begin, open_end)
    best, total, acc_a, acc_b = _attend_blocks(
        best, total, acc_a, acc_b, open_begin, open_end, q_a, q_b, positions, key, value, table, first_key, num_keys,
        span_begin, span_end, scale, window, softcap, chunk, key_stride, value_stride,
        HEAD_SIZE, HEAD_A, HEAD_B, VALUE_SIZE, VALUE_A, VALUE_B, BLOCK_N, BLOCK_SIZE, IS_ONE_STRIDE, False,
        IS_CAUSAL, HAS_WINDOW, HAS_CHUNK, HAS_SPANS, HAS_SOFTCAP,
    )  # fmt: skip
    best, total, acc_a, acc_b = _attend_blocks(
        best, total, acc_a, acc_b, open_end, end, q_a, q_b, positions, key, value, table, first_key, num_keys,
        span_begin, span_end, scale, window, softcap, chunk, key_stride, value_stride,
        HEAD_SIZE, HEAD_A, HEAD_B, VALUE_SIZE, VALUE_A, VALUE_B, BLOCK_N, BLOCK_SIZE, IS_ONE_STRIDE, True,
        IS_CAUSAL, HAS_WINDOW, HAS_CHUNK, HAS_SPANS, HAS_SOFTCAP,
    )  # fmt: skip

    weight = value_scale / tl.where(total == 0.0, 1.0, total)
    targets = out + row_index * out_stride + heads * VALUE_SIZE
    _store_rows(targets, is_row, acc_a * weight[:, None], acc_b * weight[:, None], VALUE_SIZE, VALUE_A, VALUE_B)


def attend_chunks(
    out: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cu_seqlens: torch.Tensor,
    rules: AttentionRules,
    *,
    strides: tuple[tuple[int, int], tuple[int, int]],
    least_queries: int = 1,
    key_lens: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    row_spans: torch.Tensor | None = None,
) -> None:
    """Fill the rows of `out` `(T, H * Dv)` of the sequences that have at least `least_queries` queries.

    Args:
        out: `(T, H * Dv)`.
        query: `(T, H * D)`, channels contiguous.
        keys: A cache's, or, without `table`, `(T, Hkv, D)`.
        values: Likewise.
        cu_seqlens: `(num_seqs + 1,)` int32: where each sequence's rows begin.
        rules: The layer's.
        strides: Elements from one slot, or row, to the next, and from one head to the next, of keys and of values.
        least_queries: Sequences with fewer queries are skipped.
        key_lens: `(num_seqs,)` int32: keys of each sequence; `None`: as many as queries.
        table: `(num_seqs, max_blocks)` int32 block ids.
        sinks: See `attention.attend_reference`.
        row_spans: See `attention.key_ranges`; `(2, T)` int32.
    """
    num_kv_heads, head_size = keys.shape[-2:]
    value_size = values.shape[-1]
    num_rows, num_seqs = len(query), len(cu_seqlens) - 1
    if not num_rows or not num_seqs:
        return
    (key_stride, key_head), (value_stride, value_head) = strides
    group = query.shape[1] // (num_kv_heads * head_size)
    config = chunk_config(query.dtype, max(head_size, value_size), num_rows * group // num_seqs)
    block_m = max(config.block_m, triton.next_power_of_2(group))
    block_q = block_m // group
    (head_a, head_b), (value_a, value_b) = head_parts(head_size), head_parts(value_size)
    spans = (None, None) if row_spans is None else row_spans.unbind()
    _attend[(num_kv_heads, num_rows // block_q + num_seqs)](
        *(out, query, keys, values, cu_seqlens if table is None else table, cu_seqlens),
        *(cu_seqlens if key_lens is None else key_lens, sinks, *spans, num_seqs, least_queries),
        *(*score_constants(rules), rules.v_scale, out.stride(0), query.stride(0), key_stride, value_stride),
        0 if table is None else table.stride(0),
        GROUP=group,
        HEAD_SIZE=head_size,
        HEAD_A=head_a,
        HEAD_B=head_b,
        HEAD_STRIDE=key_head,
        VALUE_SIZE=value_size,
        VALUE_A=value_a,
        VALUE_B=value_b,
        VALUE_STRIDE=value_head,
        BLOCK_Q=block_q,
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        BLOCK_SIZE=0 if table is None else keys.shape[1],
        IS_ONE_STRIDE=key_stride == value_stride,
        SEARCHED=_SEARCHED,
        HAS_KEY_LENS=key_lens is not None,
        IS_CAUSAL=rules.causal,
        HAS_WINDOW=rules.window is not None,
        HAS_CHUNK=rules.chunk is not None,
        HAS_SPANS=row_spans is not None,
        HAS_SINKS=sinks is not None,
        HAS_SOFTCAP=rules.softcap is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.max_registers,
        **chained(query.device),
    )


@cache
def head_parts(head_size: int) -> tuple[int, int]:
    """One or two powers of two, at least 16 each, with the smallest sum of at least `head_size`.

    For example 80 = 64 + 16, 96 = 64 + 32, 128 = 128 + 0; 112 is best padded to 128.
    """
    whole = max(triton.next_power_of_2(head_size), 16)
    half = whole // 2
    rest = max(triton.next_power_of_2(max(head_size - half, 1)), 16)
    return (half, rest) if half >= 16 and half + rest < whole else (whole, 0)
