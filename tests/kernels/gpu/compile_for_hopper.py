"""Compiles the GPU kernels for compute capability 9, without a GPU. Run by `test_compile.py` in its own process."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sensorium.kernels.gpu import (
    argmax,
    chunk_attention,
    decode_attention,
    fp8,
    gathered_attention,
    grouped_linear,
    linear,
    norm,
    penalties,
    rotary,
    sampling,
)

TARGET = GPUTarget("cuda", 90, 32)
HALVES = ("out", "total", "x", "residual", "weight", "bias", "query", "key", "value")
HALVES += ("query_out", "key_out", "value_out")
TYPES = {
    **dict.fromkeys(HALVES, "*bf16"),
    **dict.fromkeys(["logits", "cos", "sin", "partial", "partial_log", "values"], "*fp32"),
    **dict.fromkeys(["block_table", "cu_seqlens", "seq_lens", "key_lens"], "*i32"),
    **dict.fromkeys(["slot_mapping", "ids", "params", "findings"], "*i64"),
    **dict.fromkeys(["eps", "scale", "softcap", "value_scale", "key_factor", "value_factor"], "fp32"),
}
"""What the kernels' arguments are, by name; all others are i32."""


def compiled(
    function: Any,
    num_warps: int,
    num_stages: int = 3,
    max_registers: int | None = None,
    types: Mapping[str, str] = MappingProxyType({}),
    **constants: Any,
) -> Any:
    """The kernel's machine code and what it takes, with addresses and strides that are multiples of 16."""
    constants["IS_CHAINED"] = True
    names = function.arg_names
    types = {**TYPES, **types}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    aligned = [name for name in names if signature[name].startswith("*") or name.endswith("_stride")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(function, signature, values, attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": max_registers}
    return triton.compile(source, target=TARGET, options=options)


def main() -> None:
    values = {"VALUE_SIZE": 128, "BLOCK_N": 64, **dict.fromkeys(["HAS_WINDOW", "HAS_CHUNK", "HAS_SPANS"], False)}
    values |= dict.fromkeys(["span_begins", "span_ends"])
    head = {
        "HEAD_SIZE": 128,
        "HEAD_STRIDE": 128,
        "BLOCK_SIZE": 16,
        "HAS_SOFTCAP": False,
        "HAS_SINKS": False,
        "GROUP": 8,
    }
    rules = {**values, **head, "sinks": None}
    compiled(norm._rms_norm, 4, SIZE=2048, BLOCK=2048, ROWS=1, HAS_RESIDUAL=True, ROUND_FIRST=True)
    compiled(linear._linear, 4, SIZE=2048, ROWS=1, BLOCK_N=4, BLOCK_K=1024, HAS_BIAS=True)
    for num_rows, has_units in ((8, False), (100_000, True)):
        tile = grouped_linear.grouped_config(num_rows, 128, 2)
        grouped = compiled(
            *(grouped_linear._grouped_linear, tile.num_warps, tile.num_stages),
            types={"ends": "*i32"},
            GROUPS=128,
            HAS_BIAS=True,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
        )
        assert ("wgmma" in grouped.asm["ptx"]) is has_units
    rows = {"values": "*fp8e4nv", "scales": "*fp32", "input_scale": "*fp32"}
    compiled(fp8._quantize_rows, 8, SIZE=18944, WIDTH=18944, BLOCK=4096, HAS_SCALE=False, types=rows)
    sums = dict.fromkeys(["sums", "row_scales", "scales"], "*fp32")
    compiled(fp8._scale_sums, 4, HAS_BIAS=True, BLOCK=2048, types=sums)
    compiled(argmax._find, 8, BLOCK=4096, IS_SPLIT=True)
    rotated = {"HEADS": 16, "HEADS_PAD": 16, "KV_HEADS": 2, "KV_HEADS_PAD": 2, "HEAD_SIZE": 128, "SLOT_PAD": 256}
    rotated |= {"HALF": 64, "HALF_PAD": 64, "REST_PAD": 0, "IS_NEOX": True, "WRITES": True}
    decode = {**rules, "GROUP_PAD": 16, "HEAD_PAD": 128, "VALUE_PAD": 128, "IS_SPLIT": True}
    compiled(rotary._rotate, 4, **rotated, LARGEST=0.0)
    compiled(decode_attention._attend, 4, **decode)
    for number_format, largest in (("fp8e4nv", 448.0), ("fp8e5", 57344.0)):
        small = {"key": f"*{number_format}", "value": f"*{number_format}"}
        outs = {"key_out": f"*{number_format}", "value_out": f"*{number_format}"}
        assert "satfinite" in compiled(rotary._rotate, 4, **rotated, LARGEST=largest, types=outs).asm["ptx"]
        compiled(decode_attention._attend, 4, **decode, types=small)
    compiled(decode_attention._join, 4, **values, VALUE_PAD=128, MAX_SPLITS=128, CHUNK=64)
    tile = {"HEAD_A": 128, "HEAD_B": 0, "BLOCK_Q": 16, "BLOCK_M": 128, "SEARCHED": 128}
    tile |= {"VALUE_A": 128, "VALUE_B": 0, "VALUE_STRIDE": 128}
    for cached in ("*bf16", "*fp8e4nv"):
        chunk = compiled(
            *(chunk_attention._attend, *chunk_attention.chunk_config(torch.bfloat16, 128, 8192)[2:]),
            types={"key": cached, "value": cached},
            **rules,
            **tile,
            IS_ONE_STRIDE=True,
            HAS_KEY_LENS=True,
            IS_CAUSAL=True,
        )
        assert "wgmma" in chunk.asm["ptx"], "tiles don't use Hopper's matrix units"
    searched = {"HEAD_SIZE": 128, "TILE": 128, "SEARCHED": 128}
    for cached in ("*bf16", "*fp8e4nv"):
        types = {"keys": "*bf16", "values": "*bf16", "key": cached, "value": cached}
        compiled(gathered_attention._gather, 8, types=types, **searched, BLOCK_SIZE=16)
    described = "tensordesc<bf16[64,128]>"
    gathered = compiled(
        *(gathered_attention._attend, 4, 2),
        types={"keys": described, "values": described},
        **searched,
        GROUP=8,
        BLOCK_Q=16,
        BLOCK_M=128,
        BLOCK_N=64,
    )
    assert "wgmma" in gathered.asm["ptx"]
    assert "cp.async.bulk.tensor" in gathered.asm["ptx"], "gathered keys aren't read by descriptors"
    draw = {"MAX_NARROW_TOP_K": 1024, "NUM_CANDIDATES": 256, "GROUP": 256, "FIRST": 1 << 40}
    compiled(sampling._draw, 16, **draw, BLOCK=4096)
    compiled(penalties._penalise, 4, BLOCK=2048, types={"counts": "*i32"})


if __name__ == "__main__":
    main()
