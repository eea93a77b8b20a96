"""How near the CPU kernels come to what the machine can do, and how they compare with plain torch.

    python benchmarks/kernels.py [--threads N] [--dtype bfloat16 float32] [--seconds 0.3] [--no-torch]

The shapes are those of a Qwen2-0.5B decoder (hidden size 896, 24 layers, 14 query heads over 2 key/value heads of 64,
feed-forward size 4864, vocabulary 32000) and of a vision tower of 12 layers of 768 over images of 576 patches. Weights
and caches of all layers are walked through in turn, so that they come from memory as in a real step.

Every figure is the best of the runs that fit into `--seconds`: on a shared machine the best run is the one that was
least disturbed. The last line is one JSON object with all figures.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from sensorium import kernels
from sensorium.attention import AttentionMetadata, compute_slot_mapping
from sensorium.attention.backend import AttentionSpec
from sensorium.attention.sdpa import SdpaBackend
from sensorium.kernels import activation, build, norm, rotary

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_SIZE, FFN, VOCAB = 896, 24, 14, 2, 64, 4864, 32000
QKV = (HEADS + 2 * KV_HEADS) * HEAD_SIZE
DECODER_LINEARS = {"qkv": (QKV, HIDDEN), "o": (HIDDEN, HIDDEN), "gate_up": (2 * FFN, HIDDEN), "down": (HIDDEN, FFN)}
VISION_HIDDEN, VISION_LAYERS, VISION_PATCHES, VISION_HEADS = 768, 12, 576, 12
VISION_LINEARS = {"qkv": (3 * 768, 768), "o": (768, 768), "up": (3072, 768), "down": (768, 3072)}
CONTEXT = 300
BATCHES = (1, 4, 16, 64)

Report = dict[str, Any]


@dataclass
class Clock:
    """Times functions: the best run of those that fit into `seconds`."""

    seconds: float

    def best(self, function: Callable[[], object]) -> float:
        """Seconds of the fastest call, after one to warm up."""
        function()
        best, end = float("inf"), time.perf_counter() + self.seconds
        while time.perf_counter() < end:
            begin = time.perf_counter()
            function()
            best = min(best, time.perf_counter() - begin)
        return best


@dataclass
class Limits:
    """What the machine can do at best, measured now."""

    bytes_per_s: float
    flops_per_s: dict[torch.dtype, float] = field(default_factory=dict)

    def least_seconds(self, num_bytes: float, flops: float, dtype: torch.dtype) -> float:
        """No kernel can read so much and compute so much in less time."""
        return max(num_bytes / self.bytes_per_s, flops / self.flops_per_s[dtype])


def measure_limits(threads: int, seconds: float) -> Limits:
    """Compile and run the loops of `limits.c`; without a compiler, use torch's sum and matrix product."""
    clock = Clock(seconds)
    data = torch.ones(1 << 26)
    try:
        library = _compile_limits()
    except build.BuildError:
        square = torch.ones(1024, 1024)
        flops = 2 * 1024**3 / clock.best(lambda: square @ square)
        read = data.numel() * 4 / clock.best(data.sum)
        return Limits(read, dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), flops))
    for name in ("limits_read", "limits_fma", "limits_bf16_dot"):
        getattr(library, name).restype = ctypes.c_double
    address, count = ctypes.c_void_p(data.data_ptr()), ctypes.c_long(data.numel())
    read_s = min(library.limits_read(address, count, threads) for _ in range(5))
    rounds = 5_000_000
    fma_s = min(library.limits_fma(ctypes.c_long(rounds), threads) for _ in range(3))
    dot_s = min(library.limits_bf16_dot(ctypes.c_long(rounds), threads) for _ in range(3))
    per_round = 12 * 2 * library.limits_vector_length() * threads
    fma = rounds * per_round / fma_s
    dot = rounds * per_round * 2 / dot_s if dot_s > 0 else fma
    return Limits(data.numel() * 4 / read_s, {torch.float32: fma, torch.float16: fma, torch.bfloat16: dot})


def _compile_limits() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "limits.so"
        build.compile_sources([Path(__file__).with_name("limits.c")], path)
        return ctypes.CDLL(str(path))


def random_weights(shape: tuple[int, int], count: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """`count` different weights of N(0, 1 / fan_in)."""
    return [(torch.randn(shape) / shape[1] ** 0.5).to(dtype) for _ in range(count)]


class Decoder:
    """The pieces of one decoder step, with the weights of all layers."""

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

    def linears(self, rows: int, *, native: bool) -> Callable[[], None]:
        """A function that runs every linear layer of a step once."""
        inputs = {size: torch.randn(rows, size).to(self.dtype) for size in (HIDDEN, FFN)}

        def run_native() -> None:
            for weights in self.packed.values():
                for packed in weights:
                    kernels.packed_linear(inputs[packed.in_features], packed)

        def run_torch() -> None:
            for weights in self.plain.values():
                for weight in weights:
                    F.linear(inputs[weight.shape[1]], weight)

        return run_native if native else run_torch

    def elementwise(self, rows: int, *, native: bool) -> Callable[[], None]:
        """A function that runs the norms, rotations and activations of a step once."""
        make = {"dtype": self.dtype}
        hidden, weight = torch.randn(rows, HIDDEN).to(**make), torch.ones(HIDDEN, **make)
        fused, gate_up = torch.randn(rows, QKV).to(**make), torch.randn(rows, 2 * FFN).to(**make)
        query, key, _ = fused.unflatten(1, (-1, HEAD_SIZE)).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        cos, sin = torch.rand(2, rows, HEAD_SIZE // 2).unbind()
        add_norm = kernels.add_rms_norm if native else norm.add_rms_norm_reference
        rotate = kernels.rotary_embedding if native else rotary.rotary_embedding_reference
        activate = kernels.silu_and_mul if native else activation.silu_and_mul_reference

        def run() -> None:
            for _ in range(LAYERS):
                add_norm(hidden, hidden, weight, 1e-6)
                rotate(query, key, cos, sin)
                add_norm(hidden, hidden, weight, 1e-6)
                activate(gate_up)
            add_norm(hidden, hidden, weight, 1e-6)

        return run


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
        self.spec = AttentionSpec(HEADS, KV_HEADS, HEAD_SIZE, HEAD_SIZE**-0.5)
        shape = (2, len(ids), self.BLOCK, KV_HEADS, HEAD_SIZE)
        self.caches = [torch.randn(shape).to(dtype) for _ in range(LAYERS)]
        tokens = int(query_lens.sum())
        self.query = torch.randn(tokens, HEADS, HEAD_SIZE).to(dtype)
        self.key, self.value = torch.randn(2, tokens, KV_HEADS, HEAD_SIZE).to(dtype).unbind()
        self.num_bytes = LAYERS * sum(2 * s * KV_HEADS * HEAD_SIZE * self.key.element_size() for _, s in lens)
        self.flops = LAYERS * sum(4 * HEADS * HEAD_SIZE * (q * (s - q) + q * (q + 1) / 2) for q, s in lens)

    def run(self, *, native: bool) -> None:
        """Attend in every layer."""
        metadata, spec = self.metadata, self.spec
        for cache in self.caches:
            if native:
                kernels.write_kv(self.key, self.value, cache, metadata.slot_mapping)
                kernels.paged_attention(
                    self.query,
                    cache,
                    metadata.block_table,
                    metadata.cu_seqlens_q,
                    metadata.seq_lens,
                    scale=spec.scale,
                )
            else:
                SdpaBackend().paged(self.query, self.key, self.value, cache, metadata, spec)


class Bench:
    """Runs the cases and keeps their figures."""

    def __init__(self, limits: Limits, seconds: float, *, with_torch: bool) -> None:
        self.limits = limits
        self.clock = Clock(seconds)
        self.with_torch = with_torch
        self.figures: list[Report] = []

    def case(
        self,
        name: str,
        dtype: torch.dtype,
        rows: int,
        work: tuple[float, float],
        function: Callable[[], object],
        twin: Callable[[], object],
    ) -> None:
        """Time a kernel against plain torch; `work` is the bytes that must be read and the flops."""
        num_bytes, flops = work
        seconds = self.clock.best(function)
        torch_s = self.clock.best(twin) if self.with_torch else None
        least = self.limits.least_seconds(num_bytes, flops, dtype)
        figure = {
            "case": name,
            "dtype": str(dtype).removeprefix("torch."),
            "rows": rows,
            "ms": round(seconds * 1e3, 3),
            "gb_per_s": round(num_bytes / seconds / 1e9, 1),
            "gflop_per_s": round(flops / seconds / 1e9, 1),
            "of_limit": round(least / seconds, 3),
            "torch_ms": None if torch_s is None else round(torch_s * 1e3, 3),
        }
        self.figures.append(figure)
        faster = "" if torch_s is None else f"{torch_s * 1e3:10.2f} {torch_s / seconds:7.1f}x"
        print(
            f"{figure['dtype']:9s} {name:28s} {rows:5d} {seconds * 1e3:9.2f} {figure['gb_per_s']:7.1f} "
            f"{figure['gflop_per_s']:8.1f} {least / seconds:7.0%} {faster}",
            flush=True,
        )

    def decoder(self, dtype: torch.dtype) -> None:
        """A decoder step's linear layers, attention and element-wise operations, apart."""
        decoder = Decoder(dtype, with_torch=self.with_torch)
        parameters = decoder.num_bytes / decoder.packed["o"][0].dtype.itemsize
        for rows in (*BATCHES, 224):
            self.case(
                *("decoder linears", dtype, rows, (decoder.num_bytes, 2 * rows * parameters)),
                *(decoder.linears(rows, native=True), decoder.linears(rows, native=False)),
            )
        for rows in (*BATCHES, 224):
            # Element-wise work has no limit worth stating: its inputs are in the caches.
            self.case(
                *("decoder element-wise", dtype, rows, (0, 0)),
                *(decoder.elementwise(rows, native=True), decoder.elementwise(rows, native=False)),
            )
        for rows in BATCHES:
            self.attention(f"attention, context {CONTEXT}", [(1, CONTEXT)] * rows, dtype)
        self.attention("attention, prefill", [(224, 224)], dtype)
        self.attention("attention, chunk at 2048", [(256, 2048)], dtype)

    def attention(self, name: str, lens: list[tuple[int, int]], dtype: torch.dtype) -> None:
        """Attention and cache writes of a step, in every layer."""
        step = PagedStep(lens, dtype)
        self.case(
            *(name, dtype, step.metadata.num_tokens, (step.num_bytes, step.flops)),
            *(lambda: step.run(native=True), lambda: step.run(native=False)),
        )

    def vision(self, dtype: torch.dtype) -> None:
        """A vision tower's linear layers and attention for one image."""
        weights = [w for s in VISION_LINEARS.values() for w in random_weights(s, VISION_LAYERS, dtype)]
        packed = [kernels.pack(w) for w in weights]
        inputs = {size: torch.randn(VISION_PATCHES, size).to(dtype) for size in (768, 3072)}
        parameters = sum(w.numel() for w in weights)
        self.case(
            *("vision linears", dtype, VISION_PATCHES),
            (sum(w.nbytes for w in weights), 2 * VISION_PATCHES * parameters),
            lambda: [kernels.packed_linear(inputs[p.in_features], p) for p in packed],
            lambda: [F.linear(inputs[w.shape[1]], w) for w in weights],
        )
        query, key, value = torch.randn(3, VISION_PATCHES, VISION_HEADS, 64).to(dtype).unbind()
        starts = torch.tensor([0, VISION_PATCHES], dtype=torch.int32)
        spec = AttentionSpec(VISION_HEADS, VISION_HEADS, 64, 0.125)
        self.case(
            *("vision attention, one layer", dtype, VISION_PATCHES, (0, 4 * VISION_PATCHES**2 * 768)),
            lambda: kernels.varlen_attention(query, key, value, starts, scale=0.125, causal=False),
            lambda: SdpaBackend().varlen(query, key, value, starts, spec, causal=False),
        )
        hidden = torch.randn(VISION_PATCHES, 3072).to(dtype)
        for name, ours, twin in (
            ("gelu", kernels.gelu, F.gelu),
            ("quick_gelu", kernels.quick_gelu, activation.quick_gelu_reference),
        ):
            self.case(
                *(f"vision {name}, one layer", dtype, VISION_PATCHES, (2 * hidden.nbytes, 0)),
                *(lambda ours=ours: ours(hidden), lambda twin=twin: twin(hidden)),
            )


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
    limits = measure_limits(args.threads, args.seconds)
    peaks = ", ".join(
        f"{limits.flops_per_s[dtype] / 1e9:.0f} GFLOP/s {str(dtype).removeprefix('torch.')}"
        for dtype in (torch.bfloat16, torch.float32)
    )
    print(f"{args.threads} threads: reads {limits.bytes_per_s / 1e9:.1f} GB/s, {peaks}")
    print(f"native kernels: {kernels.native_refusal() or 'yes'}")
    print(f"{'':9s} {'':28s} {'rows':>5s} {'ms':>9s} {'GB/s':>7s} {'GFLOP/s':>8s} {'of lim.':>7s} {'torch ms':>10s}")
    bench = Bench(limits, args.seconds, with_torch=not args.no_torch)
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
