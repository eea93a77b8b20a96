"""Products of sorted rows with the weights of their groups, in one launch. The twin is in
`sensorium.kernels.grouped_linear`.

The number of rows of each group is known only on the device. So the grid has the largest possible number of tiles: one
partly filled tile for each group, and full ones. A program finds its group and rows by counting the groups' tiles, and
returns if there are no more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sensorium.kernels.gpu.chaining import await_predecessor, chained
from sensorium.kernels.native import rows_of


class GroupedConfig(NamedTuple):
    """The shape of a program's tile."""

    block_m: int
    """Rows."""
    block_n: int
    """Channels of the output."""
    block_k: int
    """Channels of the input in one iteration."""
    num_warps: int
    num_stages: int


def grouped_config(num_rows: int, num_groups: int, itemsize: int) -> GroupedConfig:
    """The tile for groups of about this size: small for few rows, whose time is that of reading weights, large for
    many."""
    block_k = 128 // itemsize
    if num_rows <= 32 * num_groups:
        return GroupedConfig(16, 64, 2 * block_k, 4, 3)
    return GroupedConfig(64 if num_rows <= 128 * num_groups else 128, 128, block_k, 8, 3)


def most_tiles(num_rows: int, num_groups: int, block_m: int) -> int:
    """The largest possible number of tiles of `block_m` rows, however rows are divided over groups."""
    return min(num_groups, num_rows) + num_rows // block_m


@triton.jit
def _grouped_linear(
    out,
    x,
    weight,
    bias,
    ends,
    num_groups,
    num_outputs,
    size,
    x_stride,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    """One program: a tile of one group's rows, and `BLOCK_N` channels of the output. `GROUPS` is a power of two."""
    await_predecessor(IS_CHAINED)
    tile = tl.program_id(1)
    groups = tl.arange(0, GROUPS)
    is_group = groups < num_groups
    stops = tl.load(ends + groups, mask=is_group, other=0)
    starts = tl.load(ends + groups - 1, mask=is_group & (groups > 0), other=0)
    tiles = tl.where(is_group, (stops - starts + BLOCK_M - 1) // BLOCK_M, 0)
    tiles_until = tl.cumsum(tiles, 0)
    group = tl.sum((tiles_until <= tile).to(tl.int32), 0)
    if group >= num_groups:
        return
    is_own = groups == group
    first_tile = tl.sum(tl.where(is_own, tiles_until - tiles, 0), 0)
    start = tl.sum(tl.where(is_own, starts, 0), 0)
    stop = tl.sum(tl.where(is_own, stops, 0), 0)

    rows = (start + (tile - first_tile) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    channels = tl.arange(0, BLOCK_K)
    is_row, is_output = rows < stop, outputs < num_outputs
    own = weight + group.to(tl.int64) * num_outputs * size
    x_cells = x + rows * x_stride + channels[None, :]
    weight_cells = own + outputs.to(tl.int64)[None, :] * size + channels[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(0, size, BLOCK_K):
        is_channel = begin + channels < size
        values = tl.load(x_cells + begin, mask=is_row & is_channel[None, :], other=0.0)
        weights = tl.load(weight_cells + begin, mask=is_output[None, :] & is_channel[:, None], other=0.0)
        acc = tl.dot(values, weights, acc, input_precision="ieee")
    if HAS_BIAS:
        own_bias = bias + group.to(tl.int64) * num_outputs
        acc += tl.load(own_bias + outputs, mask=is_output, other=0.0).to(tl.float32)[None, :]
    cells = out + rows * num_outputs + outputs[None, :]
    tl.store(cells, acc.to(out.dtype.element_ty), mask=is_row & is_output[None, :])


def grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """See `sensorium.kernels.grouped_linear.grouped_linear_reference`; `ends` are those of `RowGroups`."""
    rows = rows_of(x)
    num_rows, size = rows.shape
    num_groups, num_outputs, _ = weight.shape
    out = x.new_empty(num_rows, num_outputs)
    if not num_rows:
        return out
    config = grouped_config(num_rows, num_groups, x.element_size())
    tiles = most_tiles(num_rows, num_groups, config.block_m)
    _grouped_linear[(triton.cdiv(num_outputs, config.block_n), tiles)](
        *(out, rows, weight.contiguous(), out if bias is None else bias.contiguous(), ends),
        *(num_groups, num_outputs, size, rows.stride(0)),
        GROUPS=triton.next_power_of_2(num_groups),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        HAS_BIAS=bias is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **chained(x.device),
    )
    return out
