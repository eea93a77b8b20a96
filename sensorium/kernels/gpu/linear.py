"""Multiplication of a few rows with a weight matrix, in little more time than reading the weight once takes.

With so few rows, reading the weight takes nearly all the time. A program has a few rows of the weight, reads `BLOCK_K`
channels at a time, and multiplies without matrix units. It requests the first channels before the previous kernel has
ended (see `chaining`), since no kernel of a step writes weights.

Measured against cuBLAS on an H200 (`docs/experiments.md`): this kernel is faster for one row at every size, and for two
rows if the weight is not too large; cuBLAS is from three rows on.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sensorium.kernels.gpu.chaining import await_predecessor, chained, release_successor
from sensorium.kernels.native import rows_of

MAX_ROWS = 2
MAX_WEIGHT_OF_TWO = 60_000_000
"""The largest weight, in elements, for two rows."""


class LinearConfig(NamedTuple):
    """The shape of a program's tile."""

    block_n: int
    """Rows of the weight."""
    block_k: int
    """Channels in one iteration."""
    num_warps: int


_SIZE_OF_ITS_OWN = 18944


@cache
def linear_config(num_rows: int, size: int) -> LinearConfig:
    """The measured choice for an input of `size` channels."""
    if num_rows == 2:
        return LinearConfig(4, 2048, 8) if 2048 < size <= 8192 else LinearConfig(4, 1024, 4)
    if size <= 2048 or size == _SIZE_OF_ITS_OWN:
        return LinearConfig(4, 1024, 4)
    return LinearConfig(2 if size <= 8192 else 4, 2048, 4)


@triton.jit
def _linear(
    out,
    x,
    weight,
    bias,
    num_outputs,
    x_stride,
    weight_stride,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    """One program: `BLOCK_N` channels of the output, in all rows. Axes of tensors: row, output, input."""
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :, None]
    channels = tl.arange(0, BLOCK_K)[None, None, :]
    rows = tl.arange(0, ROWS)[:, None, None]
    is_output = outputs < num_outputs
    cells = weight + outputs.to(tl.int64) * weight_stride + channels
    ahead = tl.load(cells, mask=is_output & (channels < SIZE), other=0.0)
    release_successor(IS_CHAINED)
    await_predecessor(IS_CHAINED)
    acc = tl.zeros([ROWS, BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, SIZE, BLOCK_K):
        current = ahead
        following = start + BLOCK_K
        ahead = tl.load(cells + following, mask=is_output & (following + channels < SIZE), other=0.0)
        values = tl.load(x + rows * x_stride + start + channels, mask=start + channels < SIZE, other=0.0)
        acc += values.to(tl.float32) * current.to(tl.float32)
    total = tl.sum(acc, 2, keep_dims=True)
    if HAS_BIAS:
        total += tl.load(bias + outputs, mask=is_output, other=0.0).to(tl.float32)
    tl.store(out + rows * num_outputs + outputs, total.to(out.dtype.element_ty), mask=is_output & (rows < ROWS))


def fits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether `linear` supports these arguments, and is faster than cuBLAS."""
    return (
        0 < x.numel() <= MAX_ROWS * x.shape[-1]
        and (x.numel() == x.shape[-1] or weight.numel() <= MAX_WEIGHT_OF_TWO)
        and x.dtype == weight.dtype != torch.float32
        and weight.stride(1) == 1
        and (bias is None or bias.dtype == x.dtype)
        and x.shape[-1] == weight.shape[1]
    )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x @ weight.T + bias` for at most `MAX_ROWS` rows of `x`, summed in float32 and rounded once."""
    rows = rows_of(x)
    num_rows, size = rows.shape
    num_outputs = weight.shape[0]
    out = x.new_empty((*x.shape[:-1], num_outputs))
    config = linear_config(num_rows, size)
    _linear[(triton.cdiv(num_outputs, config.block_n),)](
        *(out, rows, weight, out if bias is None else bias),
        *(num_outputs, rows.stride(0), weight.stride(0)),
        SIZE=size,
        ROWS=num_rows,
        BLOCK_N=config.block_n,
        BLOCK_K=min(config.block_k, triton.next_power_of_2(size)),
        HAS_BIAS=bias is not None,
        num_warps=config.num_warps,
        **chained(x.device),
    )
    return out
