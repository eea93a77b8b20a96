"""Attention of long prefill chunks: one copy first gathers their sequences' keys and values from the blocks.

Reading keys block by block takes so many registers for addresses that only one program fits on a multiprocessor: while
it computes exponentials, the matrix units wait. Contiguous keys are read through descriptors (Hopper's tensor memory
accelerator), which need no such registers; two programs fit, and one multiplies while the other doesn't. Gathering
takes about a hundredth of the time of attention for a chunk of thousands of rows.

Each sequence begins at a multiple of `TILE` keys and is padded with zeros, so that a tile never reads the next
sequence's keys. For example, sequences of 130, 5 and 128 keys begin at keys 0, 256 and 384 of 512.

Rows are divided into programs as in `chunk_attention`.

Source: FlashAttention-3 (https://arxiv.org/abs/2407.08608), section 3.1, for overlapping exponentials with products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from sensorium.kernels.gpu.chaining import await_predecessor, chained
from sensorium.kernels.gpu.chunk_attention import sequence_of_tile

LOG2_E = 1.4426950408889634
TILE = 128
"""Keys that a program copies."""
_BLOCK_M, _BLOCK_N = 128, 64
_SEARCHED = 128
"""Sequences that are read together."""
MIN_ROWS = 512
MAX_KEYS_PER_ROW = 8


def fits(query: torch.Tensor, head_size: int, group: int, key_lens: Sequence[int]) -> bool:
    """Whether gathering is possible for a batch, and pays: there must be enough rows for the keys that are copied.

    This also bounds the copy's memory, to less than an MLP takes for the rows.
    """
    if query.dtype == torch.float32 or head_size not in (64, 128) or group > _BLOCK_M or not query.is_cuda:
        return False
    if torch.cuda.get_device_capability(query.device)[0] < 9:
        return False
    return len(query) >= MIN_ROWS and sum(key_lens) <= MAX_KEYS_PER_ROW * len(query)


@triton.jit
def _tiles_of(cu_seqlens, key_lens, those, num_seqs, least_queries, TILE: tl.constexpr):
    """The number of tiles of keys of each of these sequences; 0 for one with fewer than `least_queries` queries."""
    is_seq = those < num_seqs
    begin = tl.load(cu_seqlens + those, mask=is_seq, other=0)
    end = tl.load(cu_seqlens + those + 1, mask=is_seq, other=0)
    num_keys = tl.load(key_lens + those, mask=is_seq, other=0)
    return tl.where(end - begin >= least_queries, (num_keys + TILE - 1) // TILE, 0)


@triton.jit(do_not_specialize=["num_seqs", "least_queries", "table_stride"])
def _gather(
    keys,
    values,
    key,
    value,
    block_table,
    cu_seqlens,
    key_lens,
    num_seqs,
    least_queries,
    slot_stride,
    table_stride,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SEARCHED: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    """One program: one tile of one head."""
    await_predecessor(IS_CHAINED)
    tile, head = tl.program_id(0), tl.program_id(1)
    # The sequence is the first whose tiles end after this one.
    seq, tiles_before, num_tiles = 0, 0, 0
    for start in range(0, num_seqs, SEARCHED):
        those = start + tl.arange(0, SEARCHED)
        tiles = _tiles_of(cu_seqlens, key_lens, those, num_seqs, least_queries, TILE)
        is_before = (num_tiles + tl.cumsum(tiles, 0) <= tile) & (those < num_seqs)
        seq += tl.sum(is_before.to(tl.int32), 0)
        tiles_before += tl.sum(tl.where(is_before, tiles, 0), 0)
        num_tiles += tl.sum(tiles, 0)
    if tile >= num_tiles:
        return
    tokens = (tile - tiles_before) * TILE + tl.arange(0, TILE)
    is_token = tokens < tl.load(key_lens + seq)
    channels = head * HEAD_SIZE + tl.arange(0, HEAD_SIZE)
    table = block_table + tl.cast(seq, tl.int64) * table_stride
    blocks = tl.load(table + tokens // BLOCK_SIZE, mask=is_token, other=0)
    places = (blocks.to(tl.int64) * BLOCK_SIZE + tokens % BLOCK_SIZE) * slot_stride
    sources = places[:, None] + channels[None, :]
    rows = tl.cast(tile, tl.int64) * TILE + tl.arange(0, TILE)
    targets = rows[:, None] * slot_stride + channels[None, :]
    # The casts are exact: a cache may hold fewer bits.
    kept = tl.load(key + sources, mask=is_token[:, None], other=0.0)
    tl.store(keys + targets, kept.to(keys.dtype.element_ty))
    kept = tl.load(value + sources, mask=is_token[:, None], other=0.0)
    tl.store(values + targets, kept.to(values.dtype.element_ty))


@triton.jit
def _attend_blocks(
    best,
    total,
    acc,
    begin,
    end,
    q,
    keys,
    values,
    first_key,
    column,
    positions,
    scale,
    BLOCK_N: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """Attend to the keys `begin:end`, block by block."""
    for start in range(begin, end, BLOCK_N):
        k = keys.load([first_key + start, column])
        scores = tl.dot(q, k.T)
        if IS_MASKED:
            tokens = start + tl.arange(0, BLOCK_N)
            scores = tl.where(positions[:, None] >= tokens[None, :], scores, float("-inf"))
        # Every row has seen its sequence's first key in the first block, so this is finite.
        new_best = tl.maximum(best, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_best[:, None])
        fade = tl.exp2(best - new_best)
        total = total * fade + tl.sum(weights, 1)
        v = values.load([first_key + start, column])
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None])
        best = new_best
    return best, total, acc


@triton.jit(do_not_specialize=["num_seqs", "least_queries"])
def _attend(
    out,
    query,
    keys,
    values,
    cu_seqlens,
    key_lens,
    num_seqs,
    least_queries,
    scale,
    value_scale,
    out_stride,
    query_stride,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
    SEARCHED: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    """One program: one tile of queries and one key/value head. `scale` is such that weights are powers of two."""
    await_predecessor(IS_CHAINED)
    # Tiles at a sequence's end have the most keys: they run first, so that the last to run are short.
    kv_head, tile = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    seq = sequence_of_tile(cu_seqlens, tile, num_seqs, BLOCK_Q, SEARCHED)
    first_row = tl.load(cu_seqlens + seq)
    num_queries = tl.load(cu_seqlens + seq + 1) - first_row
    first_query = (tile - (first_row // BLOCK_Q + seq)) * BLOCK_Q
    if (first_query >= num_queries) | (num_queries < least_queries):
        return
    first_key = 0
    for start in range(0, seq, SEARCHED):
        those = start + tl.arange(0, SEARCHED)
        first_key += TILE * tl.sum(_tiles_of(cu_seqlens, key_lens, those, seq, least_queries, TILE), 0)

    rows, channels = tl.arange(0, BLOCK_M), tl.arange(0, HEAD_SIZE)
    queries = first_query + rows // GROUP
    is_row = (rows < BLOCK_Q * GROUP) & (queries < num_queries)
    heads = kv_head * GROUP + rows % GROUP
    row_index = (first_row + queries).to(tl.int64)
    sources = query + row_index * query_stride + heads * HEAD_SIZE
    q = tl.load(sources[:, None] + channels[None, :], mask=is_row[:, None], other=0.0)

    # A query is one of the last `num_queries` of the keys' positions; all of them see the keys up to `open_end`.
    first_position = first_query + tl.load(key_lens + seq) - num_queries
    positions = first_position + rows // GROUP
    end = tl.minimum(first_query + BLOCK_Q, num_queries) - first_query + first_position
    open_end = (first_position + 1) // BLOCK_N * BLOCK_N
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_SIZE], tl.float32)
    column = kv_head * HEAD_SIZE
    best, total, acc = _attend_blocks(
        best, total, acc, 0, open_end, q, keys, values, first_key, column, positions, scale, BLOCK_N, False
    )
    best, total, acc = _attend_blocks(
        best, total, acc, open_end, end, q, keys, values, first_key, column, positions, scale, BLOCK_N, True
    )
    targets = out + row_index * out_stride + heads * HEAD_SIZE
    found = acc / total[:, None] * value_scale
    tl.store(targets[:, None] + channels[None, :], found.to(out.dtype.element_ty), mask=is_row[:, None])


def attend_gathered(
    out: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    num_tiles: int,
    least_queries: int,
    scale: float,
    value_scale: float = 1.0,
) -> None:
    """Fill the rows of `out` `(T, H * D)` of the sequences that have at least `least_queries` queries.

    Args as for `attention.paged_attention_reference`, with `query` `(T, H * D)`; `num_tiles`: at least the sum of the
    sequences' keys in tiles of `TILE`, each rounded up; `scale` and `value_scale`: on the products of queries with
    cached numbers, and on sums of cached values.
    """
    _, block_size, num_kv_heads, head_size = keys.shape
    num_seqs, width = len(seq_lens), num_kv_heads * head_size
    group = query.shape[1] // width
    block_q = _BLOCK_M // group
    gathered = torch.empty(2, num_tiles * TILE, width, dtype=query.dtype, device=query.device)
    options = chained(query.device)
    _gather[(num_tiles, num_kv_heads)](
        *(gathered[0], gathered[1], keys, values, block_table, cu_seqlens, seq_lens),
        *(num_seqs, least_queries, width, block_table.stride(0)),
        HEAD_SIZE=head_size,
        BLOCK_SIZE=block_size,
        TILE=TILE,
        SEARCHED=_SEARCHED,
        num_warps=8,
        **options,
    )
    shape, strides = [num_tiles * TILE, width], [width, 1]
    described = [TensorDescriptor(part, shape, strides, [_BLOCK_N, head_size]) for part in gathered]
    _attend[(num_kv_heads, len(query) // block_q + num_seqs)](
        *(out, query, *described, cu_seqlens, seq_lens),
        *(num_seqs, least_queries, scale * LOG2_E, value_scale, out.stride(0), query.stride(0)),
        GROUP=group,
        HEAD_SIZE=head_size,
        BLOCK_Q=block_q,
        BLOCK_M=_BLOCK_M,
        BLOCK_N=_BLOCK_N,
        TILE=TILE,
        SEARCHED=_SEARCHED,
        num_warps=4,
        num_stages=2,
        **options,
    )


def num_tiles_of(key_lens: Sequence[int]) -> int:
    """The number of tiles of sequences with so many keys."""
    return sum(-(-length // TILE) for length in key_lens)
