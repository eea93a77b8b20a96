"""The greedy choice of a token. The twin is in `sensorium.kernels.argmax`.

If there are few rows, each is split over several programs. A program encodes its result as one integer, so that the
largest of a row's results is the answer: the upper bits are the logit's, mapped to an integer of the same order, and
the lower bits are the index counted backwards, so that the first of equal logits wins.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sensorium.kernels.gpu import num_processors
from sensorium.kernels.gpu.chaining import await_predecessor, chained
from sensorium.kernels.gpu.ordering import order_of, value_of
from sensorium.kernels.native import rows_of


class FindConfig(NamedTuple):
    """How a launch is divided into programs."""

    block: int
    """Logits that are read together."""
    num_warps: int
    programs_per_processor: int
    """Rows are split until there are about so many programs for each of the GPU's multiprocessors."""


FIND_CONFIG = FindConfig(1024, 4, 16)
"""The measured choice."""
_MAX_SPLITS = 64


@triton.jit
def _store(ids, values, row, finding):
    order = (finding >> 32).to(tl.int32)
    tl.store(ids + row, 2147483647 - (finding & 2147483647))
    tl.store(values + row, value_of(order))


@triton.jit(do_not_specialize=["share"])
def _find(
    ids,
    values,
    findings,
    logits,
    stride,
    size,
    share,
    BLOCK: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    """One program: a share of one row."""
    await_predecessor(IS_CHAINED)
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = split * share
    end = tl.minimum(begin + share, size)
    best = tl.full([BLOCK], -2147483648, tl.int32)
    place = tl.zeros([BLOCK], tl.int32)
    columns = begin + tl.arange(0, BLOCK)
    cells = logits + row * stride
    # Prefetches the next logits while these are compared.
    ahead = tl.load(cells + columns, mask=columns < end, other=0.0)
    for _ in range(begin, end, BLOCK):
        current = ahead
        ahead = tl.load(cells + columns + BLOCK, mask=columns + BLOCK < end, other=0.0)
        order = order_of(current.to(tl.float32))
        # Keeps the first of equal values.
        is_better = (columns < end) & (order > best)
        best = tl.where(is_better, order, best)
        place = tl.where(is_better, columns, place)
        columns += BLOCK
    top = tl.max(best, 0)
    first = tl.min(tl.where(best == top, place, 2147483647), 0)
    finding = (top.to(tl.int64) << 32) | (2147483647 - first).to(tl.int64)
    if IS_SPLIT:
        tl.store(findings + row * tl.num_programs(1) + split, finding)
    else:
        _store(ids, values, row, finding)


@triton.jit
def _join(ids, values, findings, num_splits, MAX_SPLITS: tl.constexpr, IS_CHAINED: tl.constexpr):
    """One program: one row."""
    await_predecessor(IS_CHAINED)
    row = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, MAX_SPLITS)
    least = -9223372036854775808
    found = tl.load(findings + row * num_splits + splits, mask=splits < num_splits, other=least)
    _store(ids, values, row, tl.max(found, 0))


def largest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `argmax.largest_reference`."""
    rows = rows_of(logits)
    num_rows, size = rows.shape
    ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    values = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if not num_rows:
        return ids, values
    options = chained(logits.device)
    block, num_warps, programs = FIND_CONFIG
    wanted = programs * num_processors(logits.device) // num_rows
    share = triton.cdiv(triton.cdiv(size, block), max(min(wanted, _MAX_SPLITS), 1)) * block
    num_splits = triton.cdiv(size, share)
    is_split = num_splits > 1
    findings = torch.empty(num_rows * num_splits, dtype=torch.int64, device=logits.device) if is_split else ids
    _find[(num_rows, num_splits)](
        *(ids, values, findings, rows, rows.stride(0), size, share),
        BLOCK=block,
        IS_SPLIT=is_split,
        num_warps=num_warps,
        **options,
    )
    if is_split:
        _join[(num_rows,)](ids, values, findings, num_splits, MAX_SPLITS=_MAX_SPLITS, num_warps=1, **options)
    return ids, values
