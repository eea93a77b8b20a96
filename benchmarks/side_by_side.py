"""Sensorium compared with other engines: the same checkpoint and the same requests; the engines take turns.

    PYTHONPATH=. python benchmarks/side_by_side.py CHECKPOINT [--peer vllm=PYTHON] [--peer transformers=PYTHON] ...

PYTHON is the interpreter of an environment that has the peer; `docs/benchmarks.md` says how to make one. A peer that
doesn't start is reported and left out. All engines stay loaded; while one works the others are stopped, so that
they take turns within seconds and neighbours on the machine weigh on all alike.

Prints each repetition, a table of medians (with the smallest and the largest) and of the share of the time that the
machine's memory and arithmetic would need at least, and as the last line one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks.kernels import Clock, Limits, measure_limits
from benchmarks.peers.workload import Request, Workload

ROOT = Path(__file__).parents[1]
PEERS = ("vllm", "transformers", "openvino")


class Engine:
    """A running engine process, stopped except while it works."""

    def __init__(self, name: str, python: str, checkpoint: Path, dtype: str, log: Path) -> None:
        self.name = name
        command = [python, str(ROOT / "benchmarks/peers/engine_process.py"), name, str(checkpoint), dtype]
        # Peers must not see this project's packages, which may differ from theirs.
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        if name == "sensorium":
            environment["PYTHONPATH"] = str(ROOT)
        self._log = log.open("w")
        self._began = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
            start_new_session=True,  # a group of its own, with its worker processes
        )
        self.versions: str = self._answer()["versions"]
        self.ready_s = time.perf_counter() - self._began
        self.pause()

    def run(self, requests: list[Request], num_tokens: int) -> float:
        """Seconds that the engine takes for so many tokens of each request."""
        os.killpg(self._process.pid, signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"requests": requests, "num_tokens": num_tokens}) + "\n")
        self._process.stdin.flush()
        seconds: float = self._answer()["seconds"]
        self.pause()
        return seconds

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = Path(self._log.name).read_text(errors="replace").strip().splitlines()[-1:]
            self.close()
            raise EngineError(f"{self.name} ended with status {self._process.returncode}: {' '.join(tail)[:300]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def pause(self) -> None:
        os.killpg(self._process.pid, signal.SIGSTOP)

    def close(self) -> None:
        """End the engine and its workers."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._log.close()


class EngineError(Exception):
    """An engine doesn't start, or ended."""


@dataclass(frozen=True)
class Sizes:
    """What a step of the model reads and computes."""

    decoder_bytes: int
    decoder_weights: int
    encoder_weights: int

    @staticmethod
    def of(checkpoint: Path) -> Sizes:
        """Counted from the checkpoint: all matrices but the embedding table; those of towers apart."""
        decoder, encoder, num_bytes = 0, 0, 0
        for path in sorted(checkpoint.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    part = file.get_slice(name)
                    count = math.prod(part.get_shape())
                    if "visual" in name or "vision" in name or "projector" in name:
                        encoder += count
                    elif "embed_tokens" not in name:
                        decoder += count
                        num_bytes += count * (4 if part.get_dtype() == "F32" else 2)
        return Sizes(num_bytes, decoder, encoder)


@dataclass
class Case:
    """A figure: how it is measured, and in which unit it is told."""

    name: str
    unit: str
    measure: Callable[[Engine, int], float]
    """The figure of one repetition, given the engine and a seed."""
    limit: float | None = None
    """The machine's limits."""
    higher_is_better: bool = True
    figures: dict[str, list[float]] = field(default_factory=dict)


def throughput(requests: Callable[[int], list[Request]], num_tokens: int) -> Callable[[Engine, int], float]:
    """Output tokens per second of a batch whose requests arrive together."""

    def measure(engine: Engine, seed: int) -> float:
        batch = requests(seed)
        return len(batch) * num_tokens / engine.run(batch, num_tokens)

    return measure


def step_ms(requests: Callable[[int], list[Request]], steps: int) -> Callable[[Engine, int], float]:
    """Milliseconds of a decoding step, from the time that `steps` more tokens take, with other prompts."""

    def measure(engine: Engine, seed: int) -> float:
        first_s = engine.run(requests(seed), 1)
        return (engine.run(requests(seed + 500), 1 + steps) - first_s) / steps * 1e3

    return measure


def first_token_ms(prepare: list[Callable[[int], Request]], request: Callable[[int], Request]) -> Any:
    """Milliseconds to the first token, after other requests."""

    def measure(engine: Engine, seed: int) -> float:
        for other in prepare:
            engine.run([other(seed)], 1)
        return engine.run([request(seed)], 1) * 1e3

    return measure


def cases_of(load: Workload, sizes: Sizes, limits: Limits, dtype: torch.dtype) -> list[Case]:
    def step_s(rows: int) -> float:
        return limits.least_seconds(sizes.decoder_bytes, 2 * rows * sizes.decoder_weights, dtype)

    def text(count: int, length: int) -> Callable[[int], list[Request]]:
        return lambda seed: load.text_requests(seed, count, length)

    text_s = 4 * step_s(2048) + 128 * step_s(64)
    cases = [
        Case("text: 64 requests, 128 in, 128 out", "tok/s", throughput(text(64, 128), 128), 64 * 128 / text_s),
        Case("decode, batch 1", "ms/step", step_ms(text(1, 64), 96), step_s(1) * 1e3, False),
        Case("decode, batch 16", "ms/step", step_ms(text(16, 32), 64), step_s(16) * 1e3, False),
    ]
    if not load.takes_images:
        return cases
    patches = (load.image_size // 14) ** 2
    prompt = patches // 4 + 76
    encode_s = limits.least_seconds(0, 2 * 32 * patches * sizes.encoder_weights, dtype)
    image_s = encode_s + limits.least_seconds(0, 2 * 32 * prompt * sizes.decoder_weights, dtype) + 63 * step_s(32)

    def ask(question: str) -> Callable[[int], Request]:
        return lambda seed: load.image_request(seed, question, load.instruction(seed))

    what, where = ask("what is this?"), ask("where in the picture is the boat?")
    images = throughput(lambda seed: load.image_requests(seed, 32), 64)
    return [
        Case(f"images: 32 requests, {load.image_size} px + 64 in, 64 out", "tok/s", images, 32 * 64 / image_s),
        *cases,
        Case("first token, new image", "ms", first_token_ms([], what), None, False),
        Case("first token, same request again", "ms", first_token_ms([what], what), None, False),
        Case("first token, same image, new question", "ms", first_token_ms([what], where), None, False),
    ]


@contextmanager
def engines_of(args: argparse.Namespace, load: Workload, folder: Path) -> Iterator[list[Engine]]:
    """The engines that start, each with its first token done; stopped. Prints why others don't."""
    pythons = {"sensorium": sys.executable, **dict(peer.split("=", 1) for peer in args.peer)}
    engines: list[Engine] = []
    try:
        for name in args.only or ["sensorium", *PEERS]:
            if name not in pythons:
                print(f"{name}: not measured, no --peer {name}=PYTHON", flush=True)
                continue
            try:
                engine = Engine(name, pythons[name], args.checkpoint, args.dtype, folder / f"{name}.log")
                engines.append(engine)
                first = load.image_requests(1, 1) if load.takes_images else load.text_requests(1, 1, 64)
                engine.ready_s += engine.run(first, 1)
            except (EngineError, OSError) as error:
                print(f"{name}: not measured: {error}", flush=True)
                continue
            print(f"{name}: first token {engine.ready_s:.1f} s after the start ({engine.versions})", flush=True)
        yield engines
    finally:
        for engine in engines:
            engine.close()


def measure(cases: list[Case], engines: list[Engine], reps: int) -> None:
    """Every repetition of a case goes through all engines, the next one the other way round."""
    for index, case in enumerate(cases):
        for rep in range(reps):
            for engine in engines[:: -1 if rep % 2 else 1]:
                figure = case.measure(engine, 10_000 * (index + 1) + 1000 * rep)
                case.figures.setdefault(engine.name, []).append(figure)
                print(f"  {case.name}, {engine.name}: {figure:.1f} {case.unit}", flush=True)


def share_of_limit(case: Case, figure: float) -> str:
    if case.limit is None:
        return "-"
    return f"{figure / case.limit if case.higher_is_better else case.limit / figure:.0%}"


def print_table(cases: list[Case], engines: list[Engine]) -> None:
    """Medians with the range, the share of the limit, and how many times better Sensorium is."""
    print(f"\n{'':50s} {'engine':12s} {'median':>9s} {'range':>17s} {'of limit':>8s} {'ratio':>6s}")
    for case in cases:
        medians = {name: statistics.median(figures) for name, figures in case.figures.items()}
        for name, median in medians.items():
            ours = medians.get("sensorium", math.nan)
            ratio = ours / median if case.higher_is_better else median / ours
            spread = f"{min(case.figures[name]):.1f}-{max(case.figures[name]):.1f}"
            print(
                f"{case.name + ', ' + case.unit:50s} {name:12s} {median:9.1f} {spread:>17s} "
                f"{share_of_limit(case, median):>8s} {ratio:6.2f}"
            )
    for engine in engines:
        print(f"{'start to first token, s':50s} {engine.name:12s} {engine.ready_s:9.1f}")


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="a Qwen2-VL, Qwen2.5-VL, LLaVA or text checkpoint")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--only", nargs="+", help="engines, by name; all that are given by default")
    parser.add_argument("--cases", nargs="+", help="first words of the cases to measure: text, decode, images, first")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--image-size", type=int, default=336, help="side of the images in pixels")
    args = parser.parse_args()
    threads = torch.get_num_threads()
    limits = measure_limits(threads, Clock(0.5))
    dtype = getattr(torch, args.dtype)
    print(
        f"{processor()}, {threads} threads: reads {limits.bytes_per_s / 1e9:.1f} GB/s, "
        f"{limits.flops_per_s[dtype] / 1e9:.0f} GFLOP/s {args.dtype}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as name:
        load = Workload(args.checkpoint, Path(name), args.image_size)
        cases = cases_of(load, Sizes.of(args.checkpoint), limits, dtype)
        if args.cases:
            cases = [case for case in cases if case.name.startswith(tuple(args.cases))]
        with engines_of(args, load, Path(name)) as engines:
            measure(cases, engines, args.reps)
            after = measure_limits(threads, Clock(0.5))
            print_table(cases, engines)
            summary = {
                "benchmark": "side_by_side",
                "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
                "processor": processor(),
                "threads": threads,
                "checkpoint": args.checkpoint.name,
                "dtype": args.dtype,
                "read_gb_per_s": [round(x.bytes_per_s / 1e9, 1) for x in (limits, after)],
                "gflop_per_s": round(limits.flops_per_s[dtype] / 1e9),
                "engines": {e.name: {"versions": e.versions, "cold_s": round(e.ready_s, 1)} for e in engines},
                "figures": {
                    case.name: {
                        "unit": case.unit,
                        "limit": case.limit and round(case.limit, 1),
                        **{engine: [round(x, 2) for x in xs] for engine, xs in case.figures.items()},
                    }
                    for case in cases
                },
            }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
