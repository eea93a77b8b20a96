"""Attention of sequences that run one token: one query per sequence over all its keys, which are split over programs.

A decode reads every key and value once and computes little, so all multiprocessors must read at the same time. A
program has the query heads of one key/value head and a *share* of its sequence's keys; a second launch joins the
results of a sequence's shares. The largest number of shares follows from the shapes of the tensors. The length of a
share, and so how many shares have keys, follows from the sequence's length, which is read on the device.

For example, with at most 3 shares and tiles of 64 keys: a sequence of 100 keys has 2 tiles, so shares of 1, 1 and 0
tiles; one of 1000 keys has 16 tiles and shares of 6, 6 and 4.

Source: Flash-Decoding (https://crfm.stanford.edu/2023/10/12/flashdecoding.html).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sensorium.kernels.attention import AttentionRules, PagedBatch, cache_strides
from sensorium.kernels.gpu import num_processors
from sensorium.kernels.gpu.chaining import await_predecessor, chained, release_successor

LOG2_E = 1.4426950408889634


class DecodeConfig(NamedTuple):
    """How a launch is divided into programs."""

    block_n: int
    """Keys of a tile."""
    num_warps: int
    num_stages: int
    programs_per_processor: int
    """Sequences are split until there are about so many programs for each of the GPU's multiprocessors."""


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
"""Shares that are joined together."""


def num_splits_for(config: DecodeConfig, num_programs: int, max_keys: int, device: torch.device, least: int) -> int:
    """The largest number of shares of a sequence's keys.

    `num_programs`: sequences times key/value heads; `max_keys`: what a row of the block table can hold; `least`: the
    smallest result.
    """
    wanted = config.programs_per_processor * num_processors(device) // num_programs
    if num_programs > 1.5 * num_processors(device):
        # Splitting would balance the work a little, but joining would take longer than that saves.
        wanted = 1
    return max(min(max(wanted, least), -(-max_keys // config.block_n), MAX_SPLITS), 1)


@triton.jit
def _first_seen(
    seq_len,
    row,
    window,
    chunk,
    span_begins,
    span_ends,
    HAS_WINDOW: tl.constexpr,
    HAS_CHUNK: tl.constexpr,
    HAS_SPANS: tl.constexpr,
):
    """The first key that a sequence's last position sees."""
    low = 0
    if HAS_WINDOW:
        low = tl.maximum(seq_len - window, 0)
    if HAS_CHUNK:
        low = tl.maximum(low, tl.maximum(seq_len - 1, 0) // chunk * chunk)
    if HAS_SPANS:
        is_inside = tl.load(span_ends + row) >= seq_len
        low = tl.where(is_inside, tl.minimum(low, tl.load(span_begins + row)), low)
    return low


@triton.jit
def _share_of(seq_len, low, num_splits, BLOCK_N: tl.constexpr):
    """Where the keys that are seen begin, rounded down to a tile, and the number of keys in a share."""
    begin = low // BLOCK_N * BLOCK_N
    num_tiles = tl.cdiv(seq_len - begin, BLOCK_N)
    return begin, tl.maximum(tl.cdiv(num_tiles, num_splits), 1) * BLOCK_N


@triton.jit(do_not_specialize=["num_splits", "window", "chunk", "table_stride"])
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
    sinks,
    span_begins,
    span_ends,
    num_splits,
    scale,
    window,
    softcap,
    chunk,
    value_scale,
    out_stride,
    query_stride,
    slot_stride,
    table_stride,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CHUNK: tl.constexpr,
    HAS_SPANS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    """One program: one share of one sequence's keys of one head. `scale` and `softcap` are such that weights are powers
    of two."""
    await_predecessor(IS_CHAINED)
    split, kv_head, seq = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(cu_seqlens + seq)
    if tl.load(cu_seqlens + seq + 1) - row != 1:
        return
    seq_len = tl.load(seq_lens + seq)
    low = _first_seen(seq_len, row, window, chunk, span_begins, span_ends, HAS_WINDOW, HAS_CHUNK, HAS_SPANS)
    begin, share = _share_of(seq_len, low, num_splits, BLOCK_N)
    first = begin + split * share
    last = tl.minimum(first + share, seq_len)
    if IS_SPLIT:  # noqa: SIM102
        if first >= last:
            return

    members, channels, parts = tl.arange(0, GROUP_PAD), tl.arange(0, HEAD_PAD), tl.arange(0, VALUE_PAD)
    is_member, is_channel, is_part = members < GROUP, channels < HEAD_SIZE, parts < VALUE_SIZE
    heads = kv_head * GROUP + members
    cells = heads[:, None] * HEAD_SIZE + channels[None, :]
    is_cell = is_member[:, None] & is_channel[None, :]
    q = tl.load(query + row.to(tl.int64) * query_stride + cells, mask=is_cell, other=0.0)

    best = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    if HAS_SINKS:
        # The first share starts with the sink, as a key of value 0.
        sink = tl.load(sinks + heads, mask=is_member, other=float("-inf")).to(tl.float32)
        sink = tl.where(tl.zeros_like(sink) + split == 0, sink, float("-inf"))
        best = sink * 1.4426950408889634  # log2(e)
        total = tl.where(sink > float("-inf"), 1.0, 0.0)
    acc = tl.zeros([GROUP_PAD, VALUE_PAD], tl.float32)
    table = block_table + seq.to(tl.int64) * table_stride
    key_cells = kv_head * HEAD_STRIDE + channels[None, :]
    value_cells = kv_head * HEAD_STRIDE + parts[None, :]
    for start in range(first, last, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        is_token = tokens < last
        if HAS_WINDOW or HAS_CHUNK:
            is_token = is_token & (tokens >= low)
        blocks = tl.load(table + tokens // BLOCK_SIZE, mask=is_token, other=0)
        places = (blocks.to(tl.int64) * BLOCK_SIZE + tokens % BLOCK_SIZE) * slot_stride
        k = tl.load(key + places[:, None] + key_cells, mask=is_token[:, None] & is_channel[None, :], other=0.0)
        k = k.to(q.dtype)  # exact: a cache may hold fewer bits
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if HAS_SOFTCAP:
            # tanh(x) = 1 - 2 / (exp(2x) + 1), which is exact at both ends.
            scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores) + 1.0))
        scores = tl.where(is_token[None, :], scores, float("-inf"))
        # Each tile has at least one key that is seen, so this is finite.
        new_best = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - new_best[:, None])
        fade = tl.exp2(best - new_best)
        total = total * fade + tl.sum(weights, 1)
        v = tl.load(value + places[:, None] + value_cells, mask=is_token[:, None] & is_part[None, :], other=0.0)
        v = v.to(q.dtype)
        acc = acc * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        best = new_best

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None] * value_scale
    is_result = is_member[:, None] & is_part[None, :]
    if IS_SPLIT:
        num_heads = tl.num_programs(1) * GROUP
        shares = (seq.to(tl.int64) * num_heads + heads) * num_splits + split
        tl.store(partial + shares[:, None] * VALUE_SIZE + parts[None, :], acc, mask=is_result)
        tl.store(partial_log + shares, best + tl.log2(total), mask=is_member)
    else:
        results = heads[:, None] * VALUE_SIZE + parts[None, :]
        tl.store(out + row.to(tl.int64) * out_stride + results, acc.to(out.dtype.element_ty), mask=is_result)


@triton.jit(do_not_specialize=["num_splits", "window", "chunk"])
def _join(
    out,
    partial,
    partial_log,
    cu_seqlens,
    seq_lens,
    span_begins,
    span_ends,
    num_splits,
    window,
    chunk,
    out_stride,
    VALUE_SIZE: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CHUNK: tl.constexpr,
    HAS_SPANS: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    """One program: joins the shares of one query head of one sequence."""
    release_successor(IS_CHAINED)
    await_predecessor(IS_CHAINED)
    head, seq = tl.program_id(0), tl.program_id(1)
    row = tl.load(cu_seqlens + seq).to(tl.int64)
    if tl.load(cu_seqlens + seq + 1) - row != 1:
        return
    seq_len = tl.load(seq_lens + seq)
    low = _first_seen(seq_len, row, window, chunk, span_begins, span_ends, HAS_WINDOW, HAS_CHUNK, HAS_SPANS)
    begin, share = _share_of(seq_len, low, num_splits, BLOCK_N)
    num_shares = tl.cdiv(seq_len - begin, share)
    shares = (seq.to(tl.int64) * tl.num_programs(0) + head) * num_splits
    every = tl.arange(0, MAX_SPLITS)
    best = tl.max(tl.load(partial_log + shares + every, mask=every < num_shares, other=float("-inf")), 0)

    channels = tl.arange(0, VALUE_PAD)
    is_channel = channels < VALUE_SIZE
    total = tl.zeros([CHUNK], tl.float32)
    acc = tl.zeros([VALUE_PAD], tl.float32)
    for start in range(0, num_shares, CHUNK):
        those = start + tl.arange(0, CHUNK)
        is_share = those < num_shares
        weights = tl.exp2(tl.load(partial_log + shares + those, mask=is_share, other=float("-inf")) - best)
        part = tl.load(
            partial + (shares + those)[:, None] * VALUE_SIZE + channels[None, :],
            mask=is_share[:, None] & is_channel[None, :],
            other=0.0,
        )
        total += weights
        acc += tl.sum(part * weights[:, None], 0)
    weight = tl.sum(total, 0)
    acc = acc / tl.where(weight == 0.0, 1.0, weight)
    cells = head * VALUE_SIZE + channels
    tl.store(out + row * out_stride + cells, acc.to(out.dtype.element_ty), mask=is_channel)


def attend_decodes(
    out: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: PagedBatch,
    rules: AttentionRules,
    sinks: torch.Tensor | None,
) -> None:
    """Fill the rows of `out` `(T, H * Dv)` of the sequences with exactly one query, at the position of their last key,
    or one that sees all keys.

    `query` is `(T, H * D)`, channels contiguous; the other arguments are those of
    `attention.paged_attention_reference`. A sequence of length 0 gets zeros.
    """
    _, block_size, num_kv_heads, head_size = keys.shape
    value_size = values.shape[3]
    slot_stride, head_stride = cache_strides(keys)
    assert cache_strides(values) == (slot_stride, head_stride)
    table, cu_seqlens, seq_lens = batch.block_table, batch.cu_seqlens_q, batch.seq_lens
    num_heads = query.shape[1] // head_size
    group = num_heads // num_kv_heads
    config = decode_config(query.dtype, max(head_size, value_size))
    num_seqs = len(seq_lens)
    # If other sequences may be in the batch, fewer programs have work.
    least = 4 if batch.max_seqlen_q > 1 else 1
    max_keys = table.shape[1] * block_size
    num_splits = num_splits_for(config, num_seqs * num_kv_heads, max_keys, query.device, least)
    is_split = num_splits > 1
    partial = partial_log = out
    if is_split:
        num_shares = num_seqs * num_heads * num_splits
        partial = torch.empty(num_shares * (value_size + 1), dtype=torch.float32, device=query.device)
        partial_log = partial[num_shares * value_size :]
    spans = (None, None) if batch.row_spans is None else batch.row_spans.unbind()
    visibility = {
        "VALUE_SIZE": value_size,
        "VALUE_PAD": max(triton.next_power_of_2(value_size), 16),
        "BLOCK_N": config.block_n,
        "HAS_WINDOW": rules.window is not None,
        "HAS_CHUNK": rules.chunk is not None,
        "HAS_SPANS": batch.row_spans is not None,
        **chained(query.device),
    }
    _attend[(num_splits, num_kv_heads, num_seqs)](
        *(out, partial, partial_log, query, keys, values, table, cu_seqlens, seq_lens, sinks, *spans),
        *(num_splits, *score_constants(rules), rules.v_scale),
        *(out.stride(0), query.stride(0), slot_stride, table.stride(0)),
        GROUP=group,
        GROUP_PAD=max(triton.next_power_of_2(group), 16),
        HEAD_SIZE=head_size,
        HEAD_PAD=max(triton.next_power_of_2(head_size), 16),
        HEAD_STRIDE=head_stride,
        BLOCK_SIZE=block_size,
        IS_SPLIT=is_split,
        HAS_SINKS=sinks is not None,
        HAS_SOFTCAP=rules.softcap is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **visibility,
    )
    if is_split:
        _join[(num_heads, num_seqs)](
            *(out, partial, partial_log, cu_seqlens, seq_lens, *spans),
            *(num_splits, rules.window or 0, rules.chunk or 0, out.stride(0)),
            MAX_SPLITS=MAX_SPLITS,
            CHUNK=_JOIN_CHUNK,
            num_warps=4,
            **visibility,
        )


def score_constants(rules: AttentionRules) -> tuple[float, int, float, int]:
    """The kernels' `scale`, `window`, `softcap` and `chunk`. Scores are scaled so that weights are powers of two,
    except the argument of a soft cap."""
    window, chunk = rules.window or 0, rules.chunk or 0
    scale = rules.scale * rules.k_scale
    if rules.softcap is None:
        return scale * LOG2_E, window, 1.0, chunk
    return scale / rules.softcap, window, rules.softcap * LOG2_E, chunk
