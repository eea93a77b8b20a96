"""Rotary position embedding in one launch, with or without writing keys and values to the cache.

The twins are in `sensorium.kernels.rotary`. A program has all heads of one token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sensorium.kernels.gpu.chaining import await_predecessor, chained
from sensorium.kernels.gpu.fp8 import largest_fp8, within_fp8
from sensorium.kernels.native import token_rows
from sensorium.kernels.rotary import Rotation


@triton.jit
def _turn(
    out,
    x,
    cos,
    sin,
    factor,
    HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
    IS_NEOX: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """The heads of one token, from `x` to `out`. `factor` and `LARGEST`: see `within_fp8`."""
    heads = tl.arange(0, HEADS_PAD)[:, None]
    pairs = tl.arange(0, HALF_PAD)[None, :]
    is_head = heads < HEADS
    is_cell = is_head & (pairs < HALF)
    cells = heads * HEAD_SIZE + (pairs if IS_NEOX else 2 * pairs)
    step = HALF if IS_NEOX else 1
    first = tl.load(x + cells, mask=is_cell, other=0.0).to(tl.float32)
    second = tl.load(x + cells + step, mask=is_cell, other=0.0).to(tl.float32)
    # Rounded to the query's dtype first, whatever the cache's is.
    turned_first = (first * cos - second * sin).to(x.dtype.element_ty)
    turned_second = (second * cos + first * sin).to(x.dtype.element_ty)
    kept_first, kept_second = within_fp8(turned_first, factor, LARGEST), within_fp8(turned_second, factor, LARGEST)
    tl.store(out + cells, kept_first.to(out.dtype.element_ty), mask=is_cell)
    tl.store(out + cells + step, kept_second.to(out.dtype.element_ty), mask=is_cell)
    if REST_PAD > 0:
        rest = 2 * HALF + tl.arange(0, REST_PAD)[None, :]
        is_rest = is_head & (rest < HEAD_SIZE)
        kept = within_fp8(tl.load(x + heads * HEAD_SIZE + rest, mask=is_rest), factor, LARGEST)
        tl.store(out + heads * HEAD_SIZE + rest, kept.to(out.dtype.element_ty), mask=is_rest)


@triton.jit
def _rotate(
    query_out,
    key_out,
    value_out,
    query,
    key,
    value,
    cos,
    sin,
    slot_mapping,
    query_stride,
    key_stride,
    value_stride,
    key_factor,
    value_factor,
    HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    KV_HEADS: tl.constexpr,
    KV_HEADS_PAD: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
    SLOT_PAD: tl.constexpr,
    IS_NEOX: tl.constexpr,
    WRITES: tl.constexpr,
    LARGEST: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    """One program: one token. With `WRITES`, its key and value are written to its slot of a cache, if it has one;
    `LARGEST` of the cache: see `within_fp8`."""
    await_predecessor(IS_CHAINED)
    token = tl.program_id(0).to(tl.int64)
    pairs = tl.arange(0, HALF_PAD)[None, :]
    c = tl.load(cos + token * HALF + pairs, mask=pairs < HALF, other=0.0).to(tl.float32)
    s = tl.load(sin + token * HALF + pairs, mask=pairs < HALF, other=0.0).to(tl.float32)
    target = query_out + token * (HEADS * HEAD_SIZE)
    source = query + token * query_stride
    _turn(target, source, c, s, 1.0, HEADS, HEADS_PAD, HEAD_SIZE, HALF, HALF_PAD, REST_PAD, IS_NEOX, 0.0)
    place = token
    if WRITES:
        place = tl.load(slot_mapping + token)
        if place < 0:
            return
    target = key_out + place * (KV_HEADS * HEAD_SIZE)
    source = key + token * key_stride
    _turn(
        target, source, c, s, key_factor,
        KV_HEADS, KV_HEADS_PAD, HEAD_SIZE, HALF, HALF_PAD, REST_PAD, IS_NEOX, LARGEST,
    )  # fmt: skip
    if WRITES:
        cells = tl.arange(0, SLOT_PAD)
        is_cell = cells < KV_HEADS * HEAD_SIZE
        kept = within_fp8(tl.load(value + token * value_stride + cells, mask=is_cell), value_factor, LARGEST)
        target = value_out + place * (KV_HEADS * HEAD_SIZE)
        tl.store(target + cells, kept.to(value_out.dtype.element_ty), mask=is_cell)


def rotary_embedding(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    is_neox_style: bool = True,
    rotary_dim: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `rotary.rotary_embedding_reference`."""
    query_out = torch.empty_like(query, memory_format=torch.contiguous_format)
    key_out = torch.empty_like(key, memory_format=torch.contiguous_format)
    query, key = token_rows(query), token_rows(key)
    rotation = Rotation(cos, sin, is_neox_style, rotary_dim)
    _launch(query_out, key_out, key_out, query, key, key, rotation, None)
    return query_out, key_out


def rotate_and_write_kv(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rotation: Rotation,
    keys: torch.Tensor,
    values: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """See `rotary.rotate_and_write_kv_reference`. Heads of values and keys must be of one size, and a slot's heads
    contiguous."""
    query_out = torch.empty_like(query, memory_format=torch.contiguous_format)
    query, key, value = token_rows(query), token_rows(key), token_rows(value)
    _launch(query_out, keys, values, query, key, value, rotation, slot_mapping, k_scale, v_scale)
    return query_out


def _launch(
    query_out: torch.Tensor,
    key_out: torch.Tensor,
    value_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rotation: Rotation,
    slot_mapping: torch.Tensor | None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    num_tokens, num_heads, head_size = query.shape
    if not num_tokens:
        return
    num_kv_heads = key.shape[1]
    half = (head_size if rotation.rotary_dim is None else rotation.rotary_dim) // 2
    cos, sin = rotation.cos.contiguous(), rotation.sin.contiguous()
    _rotate[(num_tokens,)](
        *(query_out, key_out, value_out, query, key, value, cos, sin),
        *(cos if slot_mapping is None else slot_mapping, query.stride(0), key.stride(0), value.stride(0)),
        *(1.0 / k_scale, 1.0 / v_scale),
        HEADS=num_heads,
        HEADS_PAD=triton.next_power_of_2(num_heads),
        KV_HEADS=num_kv_heads,
        KV_HEADS_PAD=triton.next_power_of_2(num_kv_heads),
        HEAD_SIZE=head_size,
        HALF=half,
        HALF_PAD=triton.next_power_of_2(half),
        REST_PAD=triton.next_power_of_2(head_size - 2 * half) if head_size > 2 * half else 0,
        SLOT_PAD=triton.next_power_of_2(num_kv_heads * head_size),
        IS_NEOX=rotation.is_neox_style,
        WRITES=slot_mapping is not None,
        LARGEST=largest_fp8(key_out.dtype),
        num_warps=4,
        **chained(query.device),
    )
