"""The CPU kernels, compared with the machine's limits and with plain torch.

    python benchmarks/kernels.py [--threads N] [--dtype bfloat16 float32] [--seconds 0.3] [--no-torch]

The shapes are those of a Qwen2-0.5B decoder (hidden size 896, 24 layers, 14 query heads over 2 key/value heads of 64,
feed-forward size 4864, vocabulary 32000) and of a vision tower of 12 layers of 768 over images of 576 patches. Weights
and caches of all layers are walked through in turn, so that they come from memory as in a real step.

A case is a list of calls, one for each layer or operation. They run in turn, again and again for `--seconds`, and the
figure is the sum of each call's best time: on a shared machine that is the time of an undisturbed step. With one thread
it is processor time, so that moments in which other processes had the core don't count. The last line is one JSON
object with all figures.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from sensorium import kernels
from sensorium.attention import AttentionMetadata, compute_slot_mapping, sdpa
from sensorium.kernels import activation, build, norm, rotary

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_SIZE, FFN, VOCAB = 896, 24, 14, 2, 64, 4864, 32000
QKV = (HEADS + 2 * KV_HEADS) * HEAD_SIZE
DECODER_LINEARS = {"qkv": (QKV, HIDDEN), "o": (HIDDEN, HIDDEN), "gate_up": (2 * FFN, HIDDEN), "down": (HIDDEN, FFN)}
VISION_HIDDEN, VISION_LAYERS, VISION_PATCHES, VISION_HEADS = 768, 12, 576, 12
VISION_LINEARS = {"qkv": (3 * 768, 768), "o": (768, 768), "up": (3072, 768), "down": (768, 3072)}
CONTEXT = 300
BATCHES = (1, 4, 16, 64)

Report = dict[str, Any]


Call = Callable[[], object]


@dataclass
class Clock:
    """Times lists of calls."""

    seconds: float
    now: Callable[[], float] = time.perf_counter

    def best(self, *calls: Call) -> float:
        """The sum of each call's best time, in rounds over all of them; the first round warms up unless it is long."""
        best = [float("inf")] * len(calls)
        end = time.perf_counter() + self.seconds
        while True:
            for i, call in enumerate(calls):
                begin = self.now()
                call()
                best[i] = min(best[i], self.now() - begin)
            if time.perf_counter() >= end:
                return sum(best)


@dataclass
class Limits:
    """What the machine can do at best, measured now."""

    bytes_per_s: float
    flops_per_s: dict[torch.dtype, float] = field(default_factory=dict)

    def least_seconds(self, num_bytes: float, flops: float, dtype: torch.dtype) -> float:
        """No kernel can read so much and compute so much in less time."""
        return max(num_bytes / self.bytes_per_s, flops / self.flops_per_s[dtype])


def measure_limits(threads: int, clock: Clock) -> Limits:
    """Compile and run the loops of `limits.c`; without a compiler, use torch's sum and matrix product."""
    chunks = torch.ones(1 << 26).chunk(16)  # of 16 MiB each; together larger than any cache
    num_bytes = sum(chunk.nbytes for chunk in chunks)
    try:
        library = _compile_limits()
    except build.BuildError:
        square = torch.ones(1024, 1024)
        flops = 2 * 1024**3 / clock.best(lambda: square @ square)
        read = num_bytes / clock.best(*(chunk.sum for chunk in chunks))
        return Limits(read, dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), flops))
    rounds = 1_000_000
    reads = [partial(library.limits_read, _address(chunk), ctypes.c_long(chunk.numel()), threads) for chunk in chunks]
    read_s = clock.best(*reads)
    fma_s = clock.best(partial(library.limits_fma, ctypes.c_long(rounds), threads))
    flops = 12 * 2 * library.limits_vector_length() * rounds * threads
    fma = flops / fma_s
    has_dot = library.limits_bf16_dot(ctypes.c_long(1), 1) == 0
    dot_s = clock.best(partial(library.limits_bf16_dot, ctypes.c_long(rounds), threads)) if has_dot else 0
    dot = 2 * flops / dot_s if has_dot else fma
    if library.sensorium_use_tiles(1):
        tile_s = clock.best(partial(library.limits_tile_dot, ctypes.c_long(rounds), threads))
        dot = max(dot, 4 * 2 * 16 * 16 * 32 * rounds * threads / tile_s)
    return Limits(num_bytes / read_s, {torch.float32: fma, torch.float16: fma, torch.bfloat16: max(dot, fma)})


def _address(x: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def _compile_limits() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "limits.so"
        sources = [
            Path(__file__).with_name("limits.c"),
            *(build.SOURCE_FOLDER / name for name in ("pool.c", "tiles.c")),
        ]
        build.compile_sources(sources, path, ["-I", str(build.SOURCE_FOLDER)])
        return ctypes.CDLL(str(path))


def random_weights(shape: tuple[int, int], count: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """`count` different weights of N(0, 1 / fan_in)."""
    return [(torch.randn(shape) / shape[1] ** 0.5).to(dtype) for _ in range(count)]


class Decoder:
    """The parts of one decoder step, with the weights of all layers."""

    def __init__(self, dtype: torch.dtype, *, with_torch: bool) -> None:
        self.dtype = dtype
        self.plain: dict[str, list[torch.Tensor]] = {}
        self.packed: dict[str, list[kernels.PackedWeight]] = {}
        self.num_bytes = 0
        shapes = {name: (shape, LAYERS) for name, shape in DECODER_LINEARS.items()}
        for name, (shape, count) in {**shapes, "lm_head": ((VOCAB, HIDDEN), 1)}.items():
            weights = random_weights(shape, count, dtype)
            self.num_bytes += sum(w.nbytes for w in weights)
            self.packed[name] = [kernels.pack(w) for w in weights]
            if with_torch:
                self.plain[name] = weights

    def linears(self, rows: int, *, native: bool) -> list[Call]:
        """Every linear layer of a step."""
        inputs = {size: torch.randn(rows, size).to(self.dtype) for size in (HIDDEN, FFN)}
        if native:
            packed = (p for weights in self.packed.values() for p in weights)
            return [partial(kernels.packed_linear, inputs[p.in_features], p) for p in packed]
        return [partial(F.linear, inputs[w.shape[1]], w) for weights in self.plain.values() for w in weights]

    def elementwise(self, rows: int, *, native: bool) -> list[Call]:
        """The norms, rotations and activations of a step."""
        hidden, weight = torch.randn(rows, HIDDEN).to(self.dtype), torch.ones(HIDDEN, dtype=self.dtype)
        fused, gate_up = torch.randn(rows, QKV).to(self.dtype), torch.randn(rows, 2 * FFN).to(self.dtype)
        heads = fused.view(rows, -1, HEAD_SIZE)
        query, key = heads[:, :HEADS], heads[:, HEADS : HEADS + KV_HEADS]
        cos, sin = torch.rand(2, rows, HEAD_SIZE // 2).unbind()
        add_norm = kernels.add_rms_norm if native else norm.add_rms_norm_reference
        rotate = kernels.rotary_embedding if native else rotary.rotary_embedding_reference
        activate = kernels.silu_and_mul if native else activation.silu_and_mul_reference
        normalise: Call = partial(add_norm, hidden, hidden, weight, 1e-6)
        layer: list[Call] = [normalise, partial(rotate, query, key, cos, sin), normalise, partial(activate, gate_up)]
        return [*(layer * LAYERS), normalise]


class PagedStep:
    """Attention of one step over the caches of all layers: `(query_len, seq_len)` of each sequence."""

    BLOCK = 16

    def __init__(self, lens: list[tuple[int, int]], dtype: torch.dtype) -> None:
        query_lens, seq_lens = (np.array(x, dtype=np.int32) for x in zip(*lens, strict=True))
        counts = -(-seq_lens // self.BLOCK)
        ids = np.random.default_rng(0).permutation(int(counts.sum())).astype(np.int32)
        table = np.zeros((len(lens), int(counts.max())), dtype=np.int32)
        for row, chunk in zip(table, np.split(ids, np.cumsum(counts)[:-1]), strict=True):
            row[: len(chunk)] = chunk
        slots = compute_slot_mapping(table, query_lens, seq_lens, self.BLOCK)
        self.metadata = AttentionMetadata.from_numpy(query_lens, seq_lens, table, slots)
        self.rules = kernels.AttentionRules(HEAD_SIZE**-0.5)
        shape = (2, len(ids), self.BLOCK, KV_HEADS, HEAD_SIZE)
        self.caches = [torch.randn(shape).to(dtype) for _ in range(LAYERS)]
        tokens = int(query_lens.sum())
        self.query = torch.randn(tokens, HEADS, HEAD_SIZE).to(dtype)
        self.key, self.value = torch.randn(2, tokens, KV_HEADS, HEAD_SIZE).to(dtype).unbind()
        self.num_bytes = LAYERS * sum(2 * s * KV_HEADS * HEAD_SIZE * self.key.element_size() for _, s in lens)
        self.flops = LAYERS * sum(4 * HEADS * HEAD_SIZE * (q * (s - q) + q * (q + 1) / 2) for q, s in lens)

    def layers(self, *, native: bool) -> list[Call]:
        """Cache writes and attention of every layer."""
        run = self._native_layer if native else self._torch_layer
        return [partial(run, cache) for cache in self.caches]

    def _native_layer(self, cache: torch.Tensor) -> None:
        parts = kernels.split_cache(cache, HEAD_SIZE, HEAD_SIZE)
        kernels.write_kv(self.key, self.value, *parts, self.metadata.slot_mapping)
        kernels.paged_attention(self.query, *parts, self.metadata, self.rules)

    def _torch_layer(self, cache: torch.Tensor) -> None:
        parts = kernels.split_cache(cache, HEAD_SIZE, HEAD_SIZE)
        kernels.write_kv(self.key, self.value, *parts, self.metadata.slot_mapping)
        sdpa.paged_attention(self.query, *parts, self.metadata, self.rules)


@dataclass
class Case:
    """Kernels, the same computation in plain torch, and the least work that both must do."""

    name: str
    dtype: torch.dtype
    rows: int
    calls: Sequence[Call]
    torch_calls: Sequence[Call]
    num_bytes: float = 0
    """That must be read from memory."""
    flops: float = 0


class Bench:
    """Runs the cases and keeps their figures."""

    def __init__(self, limits: Limits, clock: Clock, *, with_torch: bool) -> None:
        self.limits = limits
        self.clock = clock
        self.with_torch = with_torch
        self.figures: list[Report] = []

    def run(self, case: Case) -> None:
        """Time a case and print its line."""
        seconds = self.clock.best(*case.calls)
        torch_s = self.clock.best(*case.torch_calls) if self.with_torch else None
        least = self.limits.least_seconds(case.num_bytes, case.flops, case.dtype)
        figure = {
            "case": case.name,
            "dtype": str(case.dtype).removeprefix("torch."),
            "rows": case.rows,
            "ms": round(seconds * 1e3, 3),
            "gb_per_s": round(case.num_bytes / seconds / 1e9, 1),
            "gflop_per_s": round(case.flops / seconds / 1e9, 1),
            "of_limit": round(least / seconds, 3) if least else None,
            "torch_ms": None if torch_s is None else round(torch_s * 1e3, 3),
        }
        self.figures.append(figure)
        share = f"{least / seconds:7.0%}" if least else f"{'-':>7s}"
        faster = "" if torch_s is None else f"{torch_s * 1e3:10.2f} {torch_s / seconds:7.1f}x"
        print(
            f"{figure['dtype']:9s} {case.name:28s} {case.rows:5d} {seconds * 1e3:9.2f} {figure['gb_per_s']:7.1f} "
            f"{figure['gflop_per_s']:8.1f} {share} {faster}",
            flush=True,
        )

    def decoder(self, dtype: torch.dtype) -> None:
        """A decoder step's linear layers, element-wise operations, attention and greedy choice, apart."""
        decoder = Decoder(dtype, with_torch=self.with_torch)
        for rows in (*BATCHES, 224):
            calls = decoder.linears(rows, native=True), decoder.linears(rows, native=False)
            flops = 2 * rows * decoder.num_bytes / dtype.itemsize
            self.run(Case("decoder linears", dtype, rows, *calls, decoder.num_bytes, flops))
        for rows in (*BATCHES, 224):
            # No limit is given, since the inputs are in the caches.
            calls = decoder.elementwise(rows, native=True), decoder.elementwise(rows, native=False)
            self.run(Case("decoder element-wise", dtype, rows, *calls))
        for rows in BATCHES:
            self.attention(f"attention, context {CONTEXT}", [(1, CONTEXT)] * rows, dtype)
        self.attention("attention, prefill", [(224, 224)], dtype)
        self.attention("attention, chunk at 2048", [(256, 2048)], dtype)
        logits = torch.randn(16, VOCAB).to(dtype)
        choose: Call = partial(kernels.greedy_argmax, logits)
        self.run(Case("greedy choice", dtype, 16, [choose], [partial(logits.argmax, dim=-1)]))

    def attention(self, name: str, lens: list[tuple[int, int]], dtype: torch.dtype) -> None:
        """Attention and cache writes of a step, in every layer."""
        step = PagedStep(lens, dtype)
        calls = step.layers(native=True), step.layers(native=False)
        self.run(Case(name, dtype, step.metadata.num_tokens, *calls, step.num_bytes, step.flops))

    def vision(self, dtype: torch.dtype) -> None:
        """A vision tower's linear layers for one image, and attention and activations of one of its layers."""
        rows = VISION_PATCHES
        weights = [w for shape in VISION_LINEARS.values() for w in random_weights(shape, VISION_LAYERS, dtype)]
        inputs = {size: torch.randn(rows, size).to(dtype) for size in (768, 3072)}
        packed: list[Call] = [partial(kernels.packed_linear, inputs[w.shape[1]], kernels.pack(w)) for w in weights]
        plain: list[Call] = [partial(F.linear, inputs[w.shape[1]], w) for w in weights]
        num_bytes, flops = sum(w.nbytes for w in weights), 2 * rows * sum(w.numel() for w in weights)
        self.run(Case("vision linears", dtype, rows, packed, plain, num_bytes, flops))
        query, key, value = torch.randn(3, rows, VISION_HEADS, 64).to(dtype).unbind()
        starts = torch.tensor([0, rows], dtype=torch.int32)
        rules = kernels.AttentionRules(0.125, causal=False)
        attend: Call = partial(kernels.varlen_attention, query, key, value, starts, rules)
        by_torch: Call = partial(sdpa.varlen_attention, query, key, value, starts, rules)
        self.run(Case("vision attention, one layer", dtype, rows, [attend], [by_torch], 0, 4 * rows**2 * 768))
        hidden = torch.randn(rows, 3072).to(dtype)
        for name, ours, twin in (
            ("gelu", kernels.gelu, F.gelu),
            ("quick_gelu", kernels.quick_gelu, activation.quick_gelu_reference),
        ):
            self.run(Case(f"vision {name}, one layer", dtype, rows, [partial(ours, hidden)], [partial(twin, hidden)]))


def main() -> None:
    """Print the machine's limits, a table, and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--dtype", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32", "float16"]
    )
    parser.add_argument("--seconds", type=float, default=0.3, help="time for each figure")
    parser.add_argument("--no-torch", action="store_true", help="leave plain torch out")
    parser.add_argument("--only", choices=["decoder", "vision"], help="one of the two parts")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    clock = Clock(args.seconds, time.thread_time if args.threads == 1 else time.perf_counter)
    limits = measure_limits(args.threads, clock)
    peaks = ", ".join(
        f"{limits.flops_per_s[dtype] / 1e9:.0f} GFLOP/s {str(dtype).removeprefix('torch.')}"
        for dtype in (torch.bfloat16, torch.float32)
    )
    print(f"{args.threads} threads: reads {limits.bytes_per_s / 1e9:.1f} GB/s, {peaks}")
    print(f"native kernels: {kernels.native_refusal() or 'yes'}")
    print(f"{'':9s} {'':28s} {'rows':>5s} {'ms':>9s} {'GB/s':>7s} {'GFLOP/s':>8s} {'of lim.':>7s} {'torch ms':>10s}")
    bench = Bench(limits, clock, with_torch=not args.no_torch)
    for name in args.dtype:
        dtype = getattr(torch, name)
        if args.only != "vision":
            bench.decoder(dtype)
        if args.only != "decoder":
            bench.vision(dtype)
    flops = {str(d).removeprefix("torch."): round(v / 1e9, 1) for d, v in limits.flops_per_s.items()}
    summary = {"threads": args.threads, "read_gb_per_s": round(limits.bytes_per_s / 1e9, 1), "gflop_per_s": flops}
    print(json.dumps({"benchmark": "kernels", "torch": torch.__version__, **summary, "figures": bench.figures}))


if __name__ == "__main__":
    main()
