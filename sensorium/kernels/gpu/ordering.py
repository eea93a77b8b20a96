"""Floats as integers of the same order, so that they can be compared, counted and bisected exactly."""

from __future__ import annotations

import triton
import triton.language as tl

_MOST = tl.constexpr(2147483647)


@triton.jit
def order_of(value):
    """int32 with the order of the float32 numbers; NaN is above all, and both zeros are equal."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return tl.where(value != value, _MOST, bits ^ ((bits >> 31) & _MOST))


@triton.jit
def value_of(order):
    """The float32 number of an `order_of`."""
    return (order ^ ((order >> 31) & _MOST)).to(tl.float32, bitcast=True)
