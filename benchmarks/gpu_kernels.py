"""The GPU kernels of `sensorium.kernels`, compared with their twins and with the machine's limits.

    python benchmarks/gpu_kernels.py [--cases norm,decode,...] [--dry]

Needs torch, Triton and numpy, nothing else. Every kernel is first compared with its twin, then timed: many calls in one
CUDA graph, over more buffers than the cache of the chip holds. The limit is the larger of the bytes that must move over
the measured copy bandwidth and the operations over the measured matrix rate. Ends with one line of JSON. `--dry` runs
everything at tiny sizes without timing, by Triton's interpreter where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
DEVICE = "cuda" if HAS_GPU else "cpu"
# The interpreter truncates to bfloat16 instead of rounding, and multiplies its bit patterns.
DTYPE = torch.bfloat16 if HAS_GPU else torch.float16
FP8 = torch.float8_e4m3fn
"""Of a cache."""

from sensorium.attention import AttentionMetadata, compute_row_spans  # noqa: E402
from sensorium.kernels import PackedWeight, activation, argmax, norm, packed_linear, rotary  # noqa: E402
from sensorium.kernels import attention as attention_twins  # noqa: E402
from sensorium.kernels.gpu import activation as gpu_activation  # noqa: E402
from sensorium.kernels.gpu import argmax as gpu_argmax  # noqa: E402
from sensorium.kernels.gpu import attention as gpu_attention  # noqa: E402
from sensorium.kernels.gpu import decode_attention  # noqa: E402
from sensorium.kernels.gpu import linear as gpu_linear  # noqa: E402
from sensorium.kernels.gpu import norm as gpu_norm  # noqa: E402
from sensorium.kernels.gpu import rotary as gpu_rotary  # noqa: E402
from sensorium.kernels.gpu import sampling as gpu_sampling  # noqa: E402
from sensorium.kernels.linear import packed_linear_reference  # noqa: E402
from sensorium.model_executor import sampling_ops  # noqa: E402

L2_BYTES = 60_000_000
MODELS = {"3B": (16, 2, 128, 2048, 11008), "7B": (28, 4, 128, 3584, 18944), "8B": (32, 8, 128, 4096, 14336)}
"""Query heads, key/value heads, head size, hidden size, inner size of the MLP."""


@dataclass
class Case:
    """One kernel at one size."""

    name: str
    calls: list[Callable[[], Any]]
    """The same call over different buffers."""
    check: Callable[[], float] | None
    """The error, relative to the norm of the twin's output."""
    num_bytes: float
    num_operations: float = 0.0
    tolerance: float = 5e-3


def time_ms(calls: list[Callable[[], Any]], num_calls: int = 20, repeats: int = 7) -> float:
    """Milliseconds of one call, as the median of replays of a graph of many."""
    calls = (calls * num_calls)[: max(num_calls, len(calls))]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    graph.replay()
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / len(calls))
    return statistics.median(times)


def error(got: Any, want: Any) -> float:
    """`|got - want| / |want|` over all parts; infinite where a number is missing."""
    if isinstance(got, tuple):
        return max(error(a, b) for a, b in zip(got, want, strict=True))
    difference = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)
    return float(difference) if bool(torch.isfinite(difference)) else float("inf")


def randn(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def copies(num_bytes: float, dry: bool) -> int:
    """How many sets of buffers of this many bytes exceed the cache."""
    return 1 if dry else max(2, min(64, int(3 * L2_BYTES / num_bytes) + 1))


def measured_limits() -> tuple[float, float]:
    """Bytes a second of a large copy, reads and writes counted, and bfloat16 operations a second."""
    source = torch.randn(2**29, device=DEVICE, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / time_ms([lambda: torch.neg(source, out=target)], 3) * 1e3
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return bandwidth, 2 * 8192**3 / time_ms([lambda: a @ b], 4) * 1e3


def norm_cases(dry: bool) -> Iterator[Case]:
    for rows in (3,) if dry else (1, 256, 8192):
        size = 96 if dry else 2048
        num_bytes = rows * size * 2 * 4
        sets = [(randn(rows, size), randn(rows, size), randn(size)) for _ in range(copies(num_bytes, dry))]
        yield Case(
            f"add_rms_norm {rows} x {size}",
            [lambda s=s: gpu_norm.add_rms_norm(*s, 1e-6) for s in sets],
            lambda s=sets[0]: error(gpu_norm.add_rms_norm(*s, 1e-6), norm.add_rms_norm_reference(*s, 1e-6)),
            num_bytes,
        )


def activation_cases(dry: bool) -> Iterator[Case]:
    for rows in (3,) if dry else (1, 256, 8192):
        size = 70 if dry else 11008
        num_bytes = rows * size * 2 * 3
        sets = [randn(rows, 2 * size) for _ in range(copies(num_bytes, dry))]
        yield Case(
            f"silu_and_mul {rows} x {size}",
            [lambda x=x: gpu_activation.activate(x, "silu", gated=True) for x in sets],
            lambda x=sets[0]: error(
                gpu_activation.activate(x, "silu", gated=True), activation.silu_and_mul_reference(x)
            ),
            num_bytes,
        )


def rotary_cases(dry: bool) -> Iterator[Case]:
    for rows in (5,) if dry else (1, 256, 8192):
        yield rotary_case(rows, dry)
    if HAS_GPU:  # the interpreter loses carries
        yield rotary_case(5 if dry else 8192, dry, FP8)


def rotary_case(rows: int, dry: bool, cache_dtype: torch.dtype | None = None) -> Case:
    heads, kv_heads, head_size = (4, 2, 32) if dry else MODELS["3B"][:3]
    num_bytes = 2 * rows * (heads + 2 * kv_heads) * head_size * 2 + rows * head_size * 4
    sets = []
    for _ in range(copies(num_bytes, dry)):
        qkv = randn(rows, heads + 2 * kv_heads, head_size).split([heads, kv_heads, kv_heads], dim=1)
        rotation = rotary.Rotation(*(randn(rows, head_size // 2, dtype=torch.float32) for _ in range(2)))
        slots = torch.randperm(rows + 16, device=DEVICE)[:rows]
        cache = torch.zeros(2, rows // 16 + 2, 16, kv_heads, head_size).to(qkv[0])
        cache = cache if cache_dtype is None else cache.to(cache_dtype)
        sets.append((*qkv, rotation, *cache, slots))

    def check(s: Any = sets[0]) -> float:
        twin = (*s[:4], torch.zeros_like(s[4]), torch.zeros_like(s[5]), s[6])
        pairs = (gpu_rotary.rotate_and_write_kv(*s), rotary.rotate_and_write_kv_reference(*twin))
        caches = (tuple(part.float() for part in each[4:6]) for each in (s, twin))
        return max(error(*pairs), error(*caches))

    return Case(
        f"rotate_and_write_kv {rows} x ({heads} + {kv_heads}) x {head_size}{'' if cache_dtype is None else ', 8 bits'}",
        [lambda s=s: gpu_rotary.rotate_and_write_kv(*s) for s in sets],
        check,
        num_bytes,
    )


def argmax_cases(dry: bool) -> Iterator[Case]:
    for rows in (3,) if dry else (1, 64, 256):
        size = 700 if dry else 151936
        num_bytes = rows * size * 2
        sets = [randn(rows, size) for _ in range(copies(num_bytes, dry))]
        yield Case(
            f"largest {rows} x {size}",
            [lambda x=x: gpu_argmax.largest(x) for x in sets],
            lambda x=sets[0]: error(gpu_argmax.largest(x), argmax.largest_reference(x)),
            num_bytes,
            tolerance=0.0,
        )


def batch(model: str, lens: list[tuple[int, int]], dry: bool, block_size: int = 16) -> list[tuple[Any, ...]]:
    """Arguments of `paged_attention` for queries and keys of these numbers, over several caches."""
    heads, kv_heads, head_size = (4, 2, 32) if dry else MODELS[model][:3]
    counts = [-(-k // block_size) for _, k in lens]
    num_blocks = sum(counts)
    cache_bytes = 4 * num_blocks * block_size * kv_heads * head_size
    order = torch.randperm(num_blocks).to(torch.int32)
    table = np.zeros((len(lens), max(counts)), dtype=np.int32)
    for i, blocks in enumerate(order.split(counts)):
        table[i, : counts[i]] = blocks
    query_lens, seq_lens = (np.array(x, dtype=np.int32) for x in zip(*lens, strict=True))
    metadata = AttentionMetadata.from_numpy(query_lens, seq_lens, table, np.zeros(0, dtype=np.int64), device=DEVICE)
    query = randn(metadata.num_tokens, heads, head_size)
    rules = attention_twins.AttentionRules(head_size**-0.5)
    return [
        (query, *randn(2, num_blocks, block_size, kv_heads, head_size), metadata, rules)
        for _ in range(copies(cache_bytes, dry))
    ]


def attention_case(name: str, model: str, lens: list[tuple[int, int]], dry: bool, *, compared: bool = True) -> Case:
    sets = batch(model, lens, dry)
    heads, kv_heads, head_size = (4, 2, 32) if dry else MODELS[model][:3]
    operations = sum(4 * heads * head_size * (q * k - q * (q - 1) / 2) for q, k in lens)
    num_rows = sum(q for q, _ in lens)
    num_bytes = 4 * head_size * (kv_heads * sum(k for _, k in lens) + heads * num_rows)

    def check() -> float:
        got = gpu_attention.paged_attention(*sets[0])
        return error(got, attention_twins.paged_attention_reference(*sets[0]))

    return Case(
        f"{name} {model}",
        [lambda s=s: gpu_attention.paged_attention(*s) for s in sets],
        check if compared else None,
        num_bytes,
        operations,
    )


def decode_cases(dry: bool) -> Iterator[Case]:
    for model in ("3B",) if dry else MODELS:
        for count, length in (
            ((3, 40),) if dry else ((1, 1024), (16, 1024), (64, 1024), (256, 1024), (1, 16384), (16, 16384))
        ):
            lens = [(1, length - 7 * (i % 9)) for i in range(count)]
            yield attention_case(f"decode {count} at {length}", model, lens, dry, compared=count <= 64)


def prefill_cases(dry: bool) -> Iterator[Case]:
    if dry:
        yield attention_case("prefill", "3B", [(70, 90)], dry)
        yield attention_case("mixed", "3B", [(1, 40), (1, 3), (50, 70)], dry)
        return
    for model in MODELS:
        yield attention_case("prefill 8192", model, [(8192, 8192)], dry, compared=model == "3B")
    yield attention_case("chunk 1024 of 8192", "3B", [(1024, 8192)], dry)
    yield attention_case("prefill 64 x 128", "3B", [(128, 128)] * 64, dry)
    yield attention_case("64 decodes at 1024 and chunk 1024", "3B", [(1, 1024)] * 64 + [(1024, 2048)], dry)


def rule_cases(dry: bool) -> Iterator[Case]:
    """Attention of GPT-OSS's shape with each of the rules, and multi-head latent attention, with the same kernels."""
    rules = attention_twins.AttentionRules(0.125)
    heads, kv_heads, count, length = (4, 2, 3, 40) if dry else (64, 8, 64, 4096)
    sinks, window = randn(heads, dtype=torch.float32), 12 if dry else 128
    for kind, lens in (("decodes", [(1, length)] * count), ("prefill", [(length, length)])):
        spans = compute_row_spans([[(9, 30)] for _ in lens], *np.array(lens).T)
        row_spans = None if spans is None else torch.from_numpy(spans).to(DEVICE)
        for name, own, extra, sizes in (
            ("plain", rules, {}, (64, 64)),
            ("sinks", rules, {"sinks": sinks}, (64, 64)),
            (f"sinks, window {window}", replace(rules, window=window), {"sinks": sinks}, (64, 64)),
            ("chunk 1024", replace(rules, chunk=16 if dry else 1024), {}, (64, 64)),
            ("spans", rules, {"row_spans": row_spans}, (64, 64)),
            ("values of 128", rules, {}, (192, 128)),
            ("cache of 8 bits", replace(rules, k_scale=0.5, v_scale=0.25), {"cache_dtype": FP8}, (64, 64)),
        ):
            yield rule_case(f"{kind}, {name}", own, lens, (heads, kv_heads), sizes, **extra)


def rule_case(
    name: str,
    rules: attention_twins.AttentionRules,
    lens: list[tuple[int, int]],
    heads: tuple[int, int],
    sizes: tuple[int, int],
    sinks: torch.Tensor | None = None,
    row_spans: torch.Tensor | None = None,
    cache_dtype: torch.dtype | None = None,
) -> Case:
    query_lens, seq_lens = (np.array(x, dtype=np.int32) for x in zip(*lens, strict=True))
    counts = -(-seq_lens // 16)
    table = np.zeros((len(lens), int(counts.max())), dtype=np.int32)
    for row, blocks in zip(table, np.split(np.arange(counts.sum()), np.cumsum(counts)[:-1]), strict=True):
        row[: len(blocks)] = blocks
    slots = np.zeros(0, dtype=np.int64)
    metadata = AttentionMetadata.from_numpy(query_lens, seq_lens, table, slots, device=DEVICE)
    # As in recorded passes: the kernel with all rules, even where none applies.
    metadata = replace(metadata, row_spans=row_spans, is_recorded=True)
    shape = (2, int(counts.sum()), 16, heads[1], sizes[0])
    cache = randn(*shape) if sizes[0] == sizes[1] else randn(*shape[1:4], sum(sizes))
    cache = cache if cache_dtype is None else cache.to(cache_dtype)
    keys, values = attention_twins.split_cache(cache, *sizes)
    call = partial(
        gpu_attention.paged_attention,
        *(randn(metadata.num_tokens, heads[0], sizes[0]), keys, values, metadata, rules, sinks),
    )
    return Case(
        name,
        [call],
        lambda: error(call(), attention_twins.paged_attention_reference(*call.args)),
        cache.nbytes,
        sum(2 * heads[0] * sum(sizes) * (q * k - q * (q - 1) / 2) for q, k in lens),
    )


def tower_case(name: str, lens: list[int], dry: bool, size: int = 80) -> Case:
    heads, head_size = (2, 24) if dry else (16, size)
    rows = sum(lens)
    starts = torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
    num_bytes = 4 * rows * heads * head_size * 2
    sets = [randn(rows, 3 * heads, head_size).split(heads, dim=1) for _ in range(copies(num_bytes, dry))]
    rules = attention_twins.AttentionRules(head_size**-0.5, causal=False)

    def check() -> float:
        got = gpu_attention.varlen_attention(*sets[0], starts, rules)
        return error(got, attention_twins.varlen_attention_reference(*sets[0], starts, rules))

    return Case(
        f"tower, {name}",
        [lambda s=s: gpu_attention.varlen_attention(*s, starts, rules) for s in sets],
        check,
        num_bytes,
        sum(4 * heads * head_size * n * n for n in lens),
    )


def tower_cases(dry: bool) -> Iterator[Case]:
    yield tower_case("windows", [9] * 5, dry) if dry else tower_case("85 windows of 64", [64] * 85, dry)
    yield tower_case("frame", [70], dry) if dry else tower_case("frame of 5476", [5476], dry)
    for size in () if dry else (64, 72, 96, 112, 128):
        yield tower_case(f"8 frames of 729, heads of {size}", [729] * 8, dry, size)


def linear_cases(dry: bool) -> Iterator[Case]:
    for model in ("3B",) if dry else MODELS:
        heads, kv_heads, head_size, hidden, inner = (4, 2, 16, 40, 56) if dry else MODELS[model]
        sizes = {
            "qkv": ((heads + 2 * kv_heads) * head_size, hidden),
            "o": (hidden, heads * head_size),
            "gate_up": (2 * inner, hidden),
            "down": (hidden, inner),
        }
        for rows in (1, 2):
            for name, (num_outputs, size) in sizes.items():
                yield linear_case(f"linear {name} {model}, {rows} rows", rows, num_outputs, size, dry)


def linear_case(name: str, rows: int, num_outputs: int, size: int, dry: bool) -> Case:
    """The linear layer as the engine computes it: by this kernel, or by cuBLAS where that is faster."""
    num_bytes = 2 * num_outputs * size
    sets = [
        (randn(rows, size), PackedWeight(num_outputs, size, DTYPE, plain=randn(num_outputs, size)))
        for _ in range(copies(num_bytes, dry))
    ]
    x, weight = sets[0]
    if dry:
        assert weight.plain is not None
        kernel = partial(gpu_linear.linear, x, weight.plain, None)
    else:
        kernel = partial(packed_linear, x, weight)
    return Case(
        name,
        [partial(packed_linear, *s) for s in sets],
        lambda: error(kernel(), packed_linear_reference(x, weight)),
        num_bytes,
    )


def draw_cases(dry: bool) -> Iterator[Case]:
    """Sampling, compared with the twin on the CPU; the limit is one pass over the logits."""
    for rows in (3,) if dry else (1, 64, 256):
        for name, top_k, top_p in (("all tokens", 0, 1.0), ("top-k", 50, 1.0), ("top-p", 0, 0.9)):
            size = 1100 if dry else 151936
            logits = randn(rows, size, dtype=torch.float32) * 3
            same = [np.full(rows, value, np.float32) for value in (0.8, top_p, 0.0)]
            keys = np.arange(rows, dtype=np.int64)
            params = sampling_ops.RowParams(same[0], np.full(rows, top_k), same[1], same[2], keys, keys)
            yield draw_case(f"draw {rows} x {size}, {name}", logits, params)


def draw_case(name: str, logits: torch.Tensor, params: sampling_ops.RowParams) -> Case:
    packed = torch.from_numpy(params.packed()).to(DEVICE)
    call = partial(
        gpu_sampling.draw,
        *(logits, packed),
        max_narrow_top_k=sampling_ops.MAX_NARROW_TOP_K,
        num_candidates=sampling_ops.NUM_CANDIDATES,
        group_size=sampling_ops.GROUP_SIZE,
        first_group_counter=sampling_ops._GROUP_COUNTER,
    )

    def check() -> float:
        return float((call().cpu() != sampling_ops.draw_tokens(logits.cpu(), params)).double().mean())

    # Tokens may differ where two logits are within a rounding error of each other.
    return Case(name, [call], check, logits.nbytes, tolerance=0.02)


CASES: dict[str, Callable[[bool], Iterator[Case]]] = {
    "norm": norm_cases,
    "activation": activation_cases,
    "rotary": rotary_cases,
    "argmax": argmax_cases,
    "decode": decode_cases,
    "prefill": prefill_cases,
    "tower": tower_cases,
    "rules": rule_cases,
    "linear": linear_cases,
    "draw": draw_cases,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="which, separated by commas")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, no timing")
    parser.add_argument(
        "--decode", help="another configuration for decodes: keys of a tile, warps, stages, programs per processor"
    )
    arguments = parser.parse_args()
    if arguments.decode:
        config = decode_attention.DecodeConfig(*map(int, arguments.decode.split(",")))
        decode_attention.decode_config = lambda *_: config
    torch.manual_seed(0)
    dry = arguments.dry or not HAS_GPU
    bandwidth, rate = (1.0, 1.0) if dry else measured_limits()
    if not dry:
        print(f"{torch.cuda.get_device_name()}: copies {bandwidth / 1e12:.2f} TB/s, bf16 {rate / 1e12:.0f} TFLOP/s")
    print(f"{'':52}{'error':>9}{'us':>9}{'limit':>9}{'share':>7}")
    results = []
    wrong = []
    for group in arguments.cases.split(","):
        for case in CASES[group](dry):
            off = case.check() if case.check is not None else 0.0
            if not off <= case.tolerance:
                wrong.append(case.name)
            spent = 0.0 if dry else time_ms(case.calls) / 1e3
            limit = max(case.num_bytes / bandwidth, case.num_operations / rate)
            share = limit / spent if spent else 0.0
            shown = "" if case.check is None else f"{off:.1e}"
            print(f"{case.name:52}{shown:>9}{spent * 1e6:9.1f}{limit * 1e6:9.1f}{share:7.0%}", flush=True)
            results.append({"case": case.name, "error": off, "s": spent, "limit_s": limit})
            del case
            if HAS_GPU:
                torch.cuda.empty_cache()
    print(json.dumps({"bandwidth": bandwidth, "rate": rate, "wrong": wrong, "cases": results}))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
