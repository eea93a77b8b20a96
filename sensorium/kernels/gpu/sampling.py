"""Sampling in one launch: temperature, top-k, min-p, top-p and the draw, with each row's own parameters.

The twin is `draw_tokens` in `sensorium.model_executor.sampling_ops`, which defines what is drawn, with which random
numbers, and why. A program has one row. A truncation keeps the tokens whose logits are at least some bound; instead of
sorting the row, the bound is found by bisection, with one pass over the row for each iteration.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sensorium.kernels.gpu.chaining import await_predecessor, chained
from sensorium.kernels.gpu.ordering import order_of, value_of
from sensorium.kernels.native import rows_of
from sensorium.sampling_params import MIX_FACTOR_1, MIX_FACTOR_2, MIX_INCREMENT

_FACTOR_1 = tl.constexpr(MIX_FACTOR_1)
_FACTOR_2 = tl.constexpr(MIX_FACTOR_2)
_INCREMENT = tl.constexpr(MIX_INCREMENT)
_BLOCK = 4096
_MOST, _LEAST = tl.constexpr(2147483647), tl.constexpr(-2147483648)


@triton.jit
def _mix64(z):
    """`sensorium.sampling_params.mix64` of uint64."""
    z = z + _INCREMENT
    z = (z ^ (z >> 30)) * _FACTOR_1
    z = (z ^ (z >> 27)) * _FACTOR_2
    return z ^ (z >> 31)


@triton.jit
def _gumbel(start, counters):
    """Standard Gumbel noise, float64: the numbers with the indices `counters` of the stream that begins at `start`."""
    bits = _mix64(start + counters.to(tl.uint64) * _INCREMENT)
    uniform = ((bits >> 12).to(tl.float64) + 0.5) * 2.220446049250313e-16
    return -tl.log(-tl.log(uniform))


@triton.jit
def _highest(logits, size, BLOCK: tl.constexpr):
    """The highest order of a token."""
    highest = tl.full([BLOCK], _LEAST, tl.int32)
    for start in tl.range(0, size, BLOCK, num_stages=4):
        columns = start + tl.arange(0, BLOCK)
        value = tl.load(logits + columns, mask=columns < size, other=float("-inf"))
        highest = tl.maximum(highest, order_of(value))
    return tl.max(highest, 0)


@triton.jit
def _lowest(logits, size, temperature, least, BLOCK: tl.constexpr):
    """The lowest order of a token whose score is at least `least`."""
    lowest = tl.full([BLOCK], _MOST, tl.int32)
    for start in tl.range(0, size, BLOCK, num_stages=4):
        columns = start + tl.arange(0, BLOCK)
        value = tl.load(logits + columns, mask=columns < size, other=float("-inf"))
        stays = (columns < size) & (tl.div_rn(value, temperature) >= least)
        lowest = tl.minimum(lowest, tl.where(stays, order_of(value), _MOST))
    return tl.min(lowest, 0)


@triton.jit
def _above(logits, size, order, temperature, top, BLOCK: tl.constexpr):
    """Of the tokens above `order`: their number, the sum of their exponentials, and their lowest order.

    Last, the highest order of the other tokens.
    """
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    lowest = tl.full([BLOCK], _MOST, tl.int32)
    highest = tl.full([BLOCK], _LEAST, tl.int32)
    for start in tl.range(0, size, BLOCK, num_stages=4):
        columns = start + tl.arange(0, BLOCK)
        is_token = columns < size
        value = tl.load(logits + columns, mask=is_token, other=float("-inf"))
        orders = order_of(value)
        is_above = is_token & (orders > order)
        mass += tl.where(is_above, tl.exp(tl.div_rn(value, temperature) - top), 0.0)
        count += is_above.to(tl.int32)
        lowest = tl.minimum(lowest, tl.where(is_above, orders, _MOST))
        highest = tl.maximum(highest, tl.where(is_token & (orders <= order), orders, _LEAST))
    return tl.sum(count, 0), tl.sum(mass, 0), tl.min(lowest, 0), tl.max(highest, 0)


@triton.jit
def _bound(logits, size, low, high, max_count, max_mass, temperature, top, BLOCK: tl.constexpr):
    """The lowest order of a token above which there are fewer than `max_count` tokens, of less than `max_mass`.

    `low` and `high` are orders of tokens; `high` meets the condition. The range of logits is bisected, and each
    iteration rounds its midpoint to a token's order.
    """
    while low < high:
        middle = order_of(0.5 * value_of(low) + 0.5 * value_of(high))
        middle = tl.maximum(tl.minimum(middle, high - 1), low)
        count, mass, lowest, highest = _above(logits, size, middle, temperature, top, BLOCK)
        holds = (count < max_count) & (mass < max_mass)
        low = tl.where(holds, low, lowest)
        high = tl.where(holds, highest, high)
    return high


@triton.jit
def _draw_tokens(logits, size, start, bound, temperature, BLOCK: tl.constexpr):
    """Draw one of the remaining tokens, with noise for each."""
    best = tl.full([1], float("-inf"), tl.float64)
    chosen = tl.zeros([1], tl.int32)
    for begin in range(0, size, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        value = tl.load(logits + columns, mask=columns < size, other=float("-inf"))
        score = tl.div_rn(value, temperature)
        stays = (columns < size) & (order_of(value) >= bound)
        if tl.sum(stays.to(tl.int32), 0) > 0:
            noisy = tl.where(stays, score.to(tl.float64) + _gumbel(start, columns), float("-inf"))
            most = tl.max(noisy, 0)
            first = tl.min(tl.where(noisy == most, columns, _MOST), 0)
            chosen = tl.where(most > best, first, chosen)
            best = tl.where(most > best, most, best)
    return tl.max(chosen, 0)


@triton.jit
def _draw_group(
    logits, size, start, bound, temperature, top, GROUP: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr
):
    """Draw a group of neighbours by its weight, then one of its tokens."""
    best = tl.full([1], float("-inf"), tl.float64)
    group = tl.zeros([1], tl.int32)
    for begin in range(0, size, BLOCK):
        groups = begin // GROUP + tl.arange(0, BLOCK // GROUP)
        columns = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        value = tl.load(logits + columns, mask=columns < size, other=float("-inf"))
        score = tl.div_rn(value, temperature)
        stays = (columns < size) & (order_of(value) >= bound)
        weight = tl.sum(tl.where(stays, tl.exp(score - top), 0.0), 1)
        has_weight = weight > 0.0
        log_weight = tl.log(tl.where(has_weight, weight, 1.0).to(tl.float64))
        noisy = tl.where(has_weight, log_weight + _gumbel(start, FIRST + groups.to(tl.int64)), float("-inf"))
        most = tl.max(noisy, 0)
        first = tl.min(tl.where(noisy == most, groups, _MOST), 0)
        group = tl.where(most > best, first, group)
        best = tl.where(most > best, most, best)
    columns = tl.max(group, 0) * GROUP + tl.arange(0, GROUP)
    value = tl.load(logits + columns, mask=columns < size, other=float("-inf"))
    score = tl.div_rn(value, temperature)
    stays = (columns < size) & (order_of(value) >= bound)
    noisy = tl.where(stays, (score - top).to(tl.float64) + _gumbel(start, columns), float("-inf"))
    return tl.min(tl.where(noisy == tl.max(noisy, 0), columns, size - 1), 0)


@triton.jit
def _draw(
    ids,
    logits,
    params,
    stride,
    size,
    MAX_NARROW_TOP_K: tl.constexpr,
    NUM_CANDIDATES: tl.constexpr,
    GROUP: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    """One program: one row."""
    await_predecessor(IS_CHAINED)
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    params += row * 6
    temperature = tl.load(params).to(tl.int32).to(tl.float32, bitcast=True)
    top_k = tl.load(params + 1)
    top_p = tl.load(params + 2).to(tl.int32).to(tl.float32, bitcast=True)
    min_p = tl.load(params + 3).to(tl.int32).to(tl.float32, bitcast=True)
    start = _mix64((tl.load(params + 4) + tl.load(params + 5)).to(tl.uint64))

    highest = _highest(logits, size, BLOCK)
    top = tl.div_rn(value_of(highest), temperature)
    bound = tl.full([], _LEAST, tl.int32)
    by_token = False
    if (top_k > 0) | (top_p < 1.0) | (min_p > 0.0):
        least = top + tl.where(min_p > 0.0, tl.log(tl.where(min_p > 0.0, min_p, 1.0)), float("-inf"))
        bound = _lowest(logits, size, temperature, least, BLOCK)
        if top_k > 0:
            bound = _bound(logits, size, bound, highest, top_k, float("inf"), temperature, top, BLOCK)
        if top_p < 1.0:
            # The mass that top-k and min-p keep; of the tokens equal to the last one, only as many count as top-k
            # keeps.
            above, mass, _, _ = _above(logits, size, bound, temperature, top, BLOCK)
            reached, _, _, _ = _above(logits, size, bound - 1, temperature, top, BLOCK)
            if top_k > 0:
                reached = tl.minimum(reached, top_k).to(tl.int32)
            at_bound = tl.exp(tl.div_rn(value_of(bound), temperature) - top)
            mass = top_p * (mass + (reached - above).to(tl.float32) * at_bound)
            bound = _bound(logits, size, bound, highest, size + 1, mass, temperature, top, BLOCK)
        num_kept, _, _, _ = _above(logits, size, bound - 1, temperature, top, BLOCK)
        by_token = (num_kept < tl.minimum(size, NUM_CANDIDATES)) | ((top_k > 0) & (top_k <= MAX_NARROW_TOP_K))
    if by_token:
        token = _draw_tokens(logits, size, start, bound, temperature, BLOCK)
    else:
        token = _draw_group(logits, size, start, bound, temperature, top, GROUP, FIRST, BLOCK)
    tl.store(ids + row, token.to(tl.int64))


def draw(
    logits: torch.Tensor,
    params: torch.Tensor,
    *,
    max_narrow_top_k: int,
    num_candidates: int,
    group_size: int,
    first_group_counter: int,
) -> torch.Tensor:
    """A token id for each row of float32 logits `(num_rows, vocab_size)`, int64 `(num_rows,)`.

    `params` is int64 `(num_rows, 6)` on the device: temperature, top-k, top-p, min-p, key and position of each row,
    with those that are floats as float32 bits. The constants are those of the twin.
    """
    rows = rows_of(logits)
    num_rows, size = rows.shape
    ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows:
        _draw[(num_rows,)](
            *(ids, rows, params, rows.stride(0), size),
            MAX_NARROW_TOP_K=max_narrow_top_k,
            NUM_CANDIDATES=num_candidates,
            GROUP=group_size,
            FIRST=first_group_counter,
            BLOCK=_BLOCK,
            num_warps=_BLOCK // 256,
            **chained(logits.device),
        )
    return ids
