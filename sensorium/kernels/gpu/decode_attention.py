"""Attention of sequences that run one token: one query per sequence over all its keys, which are split over programs.

A decode reads every key and value once and computes little, so that all processors have to read at the same time. A
program has the query heads of one key/value head and a *share* of its sequence's keys; what the shares of a sequence
found is joined in a second launch. How many shares there are at most follows from the shapes of the tensors; how long
they are, and so how many of them find something to do, from the sequence's length, which lies on the device.

Worked example: 3 shares at most, tiles of 64 keys. A sequence of 100 keys has 2 tiles, so shares of 1 tile, of which
the third is empty; one of 1000 keys has 16 tiles and shares of 6, 6 and 4 tiles.

Source: Flash-Decoding (https://crfm.stanford.edu/2023/10/12/flashdecoding.html).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sensorium.kernels.gpu import num_processors
from sensorium.kernels.gpu.chaining import await_predecessor, chained, release_successor

LOG2_E = 1.4426950408889634


class DecodeConfig(NamedTuple):
    """How a launch is cut into programs."""

    block_n: int
    """Keys of a tile."""
    num_warps: int
    num_stages: int
    programs_per_processor: int
    """How many programs are to be had, by splitting, for each of the GPU's processors."""


@cache
def decode_config(dtype: torch.dtype, head_size: int) -> DecodeConfig:
    """The measured choice."""
    if dtype == torch.float32:
        return DecodeConfig(32, 4, 1, 4)
    if head_size > 128:
        return DecodeConfig(32, 4, 3, 4)
    return DecodeConfig(64, 4, 3, 4)


MAX_SPLITS = 128
_JOIN_CHUNK = 64
"""Shares that are joined at a time."""


def num_splits_for(config: DecodeConfig, num_programs: int, max_keys: int, device: torch.device, least: int) -> int:
    """Shares that the keys of a sequence are split into at most.

    `num_programs`: sequences times key/value heads; `max_keys`: what a row of the block table can hold; `least`: how
    many there should be in any case.
    """
    wanted = config.programs_per_processor * num_processors(device) // num_programs
    if num_programs > 1.5 * num_processors(device):
        # Splitting would even out the work a little, and joining take longer than that saves.
        wanted = 1
    return max(min(max(wanted, least), -(-max_keys // config.block_n), MAX_SPLITS), 1)


@triton.jit
def _share_of(seq_len, window, num_splits, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Where the keys that are seen begin, rounded down to a tile, and how many of them make a share."""
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(seq_len - window, 0) // BLOCK_N * BLOCK_N
    num_tiles = tl.cdiv(seq_len - begin, BLOCK_N)
    return begin, tl.maximum(tl.cdiv(num_tiles, num_splits), 1) * BLOCK_N


@triton.jit(do_not_specialize=["num_splits", "window", "table_stride"])
def _attend(
    out,
    partial,
    partial_log,
    query,
    key,
    value,
    block_table,
    cu_seqlens,
    seq_lens,
    num_splits,
    scale,
    window,
    softcap,
    out_stride,
    query_stride,
    slot_stride,
    table_stride,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    """One share, of one sequence's keys of one head. `scale` and `softcap` are such that weights are powers of two."""
    await_predecessor(IS_CHAINED)
    split, kv_head, seq = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(cu_seqlens + seq)
    if tl.load(cu_seqlens + seq + 1) - row != 1:
        return
    seq_len = tl.load(seq_lens + seq)
    begin, share = _share_of(seq_len, window, num_splits, BLOCK_N, HAS_WINDOW)
    first = begin + split * share
    last = tl.minimum(first + share, seq_len)
    if IS_SPLIT:  # noqa: SIM102
        if first >= last:
            return

    members, channels = tl.arange(0, GROUP_PAD), tl.arange(0, HEAD_PAD)
    is_channel = channels < HEAD_SIZE
    is_cell = (members < GROUP)[:, None] & is_channel[None, :]
    heads = kv_head * GROUP + members
    cells = heads[:, None] * HEAD_SIZE + channels[None, :]
    q = tl.load(query + row.to(tl.int64) * query_stride + cells, mask=is_cell, other=0.0)

    best = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, HEAD_PAD], tl.float32)
    table = block_table + seq.to(tl.int64) * table_stride
    kv_cells = kv_head * HEAD_SIZE + channels[None, :]
    for start in range(first, last, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        is_token = tokens < last
        blocks = tl.load(table + tokens // BLOCK_SIZE, mask=is_token, other=0)
        places = (blocks.to(tl.int64) * BLOCK_SIZE + tokens % BLOCK_SIZE) * slot_stride
        is_kv = is_token[:, None] & is_channel[None, :]
        k = tl.load(key + places[:, None] + kv_cells, mask=is_kv, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if HAS_SOFTCAP:
            # tanh(x) = 1 - 2 / (exp(2x) + 1), which is right at both ends.
            scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores) + 1.0))
        if HAS_WINDOW:
            is_token = is_token & (tokens >= seq_len - window)
        scores = tl.where(is_token[None, :], scores, float("-inf"))
        # A tile has at least one key that is seen, so that this is a number.
        new_best = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - new_best[:, None])
        fade = tl.exp2(best - new_best)
        total = total * fade + tl.sum(weights, 1)
        v = tl.load(value + places[:, None] + kv_cells, mask=is_kv, other=0.0)
        acc = acc * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        best = new_best

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if IS_SPLIT:
        num_heads = tl.num_programs(1) * GROUP
        shares = (seq.to(tl.int64) * num_heads + heads) * num_splits + split
        tl.store(partial + shares[:, None] * HEAD_SIZE + channels[None, :], acc, mask=is_cell)
        tl.store(partial_log + shares, best + tl.log2(total), mask=members < GROUP)
    else:
        tl.store(out + row.to(tl.int64) * out_stride + cells, acc.to(out.dtype.element_ty), mask=is_cell)


@triton.jit(do_not_specialize=["num_splits", "window"])
def _join(
    out,
    partial,
    partial_log,
    cu_seqlens,
    seq_lens,
    num_splits,
    window,
    out_stride,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    """One query head of one sequence, from its shares."""
    release_successor(IS_CHAINED)
    await_predecessor(IS_CHAINED)
    head, seq = tl.program_id(0), tl.program_id(1)
    row = tl.load(cu_seqlens + seq).to(tl.int64)
    if tl.load(cu_seqlens + seq + 1) - row != 1:
        return
    seq_len = tl.load(seq_lens + seq)
    begin, share = _share_of(seq_len, window, num_splits, BLOCK_N, HAS_WINDOW)
    num_shares = tl.cdiv(seq_len - begin, share)
    shares = (seq.to(tl.int64) * tl.num_programs(0) + head) * num_splits
    every = tl.arange(0, MAX_SPLITS)
    best = tl.max(tl.load(partial_log + shares + every, mask=every < num_shares, other=float("-inf")), 0)

    channels = tl.arange(0, HEAD_PAD)
    is_channel = channels < HEAD_SIZE
    total = tl.zeros([CHUNK], tl.float32)
    acc = tl.zeros([HEAD_PAD], tl.float32)
    for start in range(0, num_shares, CHUNK):
        those = start + tl.arange(0, CHUNK)
        is_share = those < num_shares
        weights = tl.exp2(tl.load(partial_log + shares + those, mask=is_share, other=float("-inf")) - best)
        part = tl.load(
            partial + (shares + those)[:, None] * HEAD_SIZE + channels[None, :],
            mask=is_share[:, None] & is_channel[None, :],
            other=0.0,
        )
        total += weights
        acc += tl.sum(part * weights[:, None], 0)
    weight = tl.sum(total, 0)
    acc = acc / tl.where(weight == 0.0, 1.0, weight)
    cells = head * HEAD_SIZE + channels
    tl.store(out + row * out_stride + cells, acc.to(out.dtype.element_ty), mask=is_channel)


def attend_decodes(
    out: torch.Tensor,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    is_mixed: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """Fill the rows of `out` `(T, H * D)` of the sequences that have exactly one query.

    `query` is `(T, H * D)` with channels side by side; the others are as for `attention.paged_attention_reference`.
    A sequence of length 0 gets zeros. `is_mixed`: there may be other sequences, so that fewer programs find something
    to do.
    """
    block_size, num_kv_heads, head_size = kv_cache.shape[2:]
    num_heads = query.shape[1] // head_size
    group = num_heads // num_kv_heads
    config = decode_config(query.dtype, head_size)
    max_keys = block_table.shape[1] * block_size
    num_seqs = len(seq_lens)
    num_splits = num_splits_for(config, num_seqs * num_kv_heads, max_keys, query.device, 4 if is_mixed else 1)
    is_split = num_splits > 1
    partial = partial_log = out
    if is_split:
        num_shares = num_seqs * num_heads * num_splits
        partial = torch.empty(num_shares * (head_size + 1), dtype=torch.float32, device=query.device)
        partial_log = partial[num_shares * head_size :]
    # Scores in powers of two; a soft cap's argument stays as it was.
    rules = (scale / softcap, window or 0, softcap * LOG2_E) if softcap else (scale * LOG2_E, window or 0, 1.0)
    head_pad = max(triton.next_power_of_2(head_size), 16)
    _attend[(num_splits, num_kv_heads, num_seqs)](
        *(out, partial, partial_log, query, kv_cache[0], kv_cache[1], block_table, cu_seqlens, seq_lens),
        *(num_splits, *rules, out.stride(0), query.stride(0), num_kv_heads * head_size, block_table.stride(0)),
        GROUP=group,
        GROUP_PAD=max(triton.next_power_of_2(group), 16),
        HEAD_SIZE=head_size,
        HEAD_PAD=head_pad,
        BLOCK_N=config.block_n,
        BLOCK_SIZE=block_size,
        IS_SPLIT=is_split,
        HAS_WINDOW=window is not None,
        HAS_SOFTCAP=softcap is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **chained(query.device),
    )
    if is_split:
        _join[(num_heads, num_seqs)](
            *(out, partial, partial_log, cu_seqlens, seq_lens, num_splits, window or 0, out.stride(0)),
            HEAD_SIZE=head_size,
            HEAD_PAD=head_pad,
            BLOCK_N=config.block_n,
            MAX_SPLITS=MAX_SPLITS,
            CHUNK=_JOIN_CHUNK,
            HAS_WINDOW=window is not None,
            num_warps=4,
            **chained(query.device),
        )
