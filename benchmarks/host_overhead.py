"""Host work per engine step: everything but the model's own arithmetic, at a batch of decoding requests.

    python benchmarks/host_overhead.py [--batch 16] [--steps 200]

Runs a tiny random checkpoint, so that a step is almost nothing but host work, and takes the time of `forward`,
`compute_logits` and the sampler's argmax off each step. Prints the parts, and a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from sensorium import LLMEngine, SamplingParams
from sensorium.outputs import OutputKind
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.serving import make_engine


class Stopwatch:
    """Adds up the time spent in wrapped functions since the last reset."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - begin

        return timed


def measure(engine: LLMEngine, batch: int, steps: int) -> dict[str, float]:
    """Median milliseconds of a step's parts."""
    worker = engine.core.executor.worker  # type: ignore[attr-defined]
    model_time, worker_time, core_time = Stopwatch(), Stopwatch(), Stopwatch()
    worker.runner._driver.forward = model_time.wrap(worker.runner._driver.forward)
    worker.model.compute_logits = model_time.wrap(worker.model.compute_logits)
    worker.submit = worker_time.wrap(worker.submit)
    worker.runner.collect = worker_time.wrap(worker.runner.collect)
    engine.core.step = core_time.wrap(engine.core.step)  # type: ignore[method-assign]
    params = SamplingParams(temperature=0, max_tokens=steps + 50, ignore_eos=True)
    for i in range(batch):
        engine.add_processed(engine.preprocess(f"r{i}", f"request {i} says", params), OutputKind.DELTA)
    rows: list[tuple[float, float, float, float]] = []
    for step in range(steps + 20):
        for watch in (model_time, worker_time, core_time):
            watch.seconds = 0.0
        begin = time.perf_counter()
        engine.step()
        whole = time.perf_counter() - begin
        if step >= 20:
            rows.append((whole, core_time.seconds, worker_time.seconds, model_time.seconds))
    scheduler = [core - work for _, core, work, _ in rows]
    parts = {
        "scheduler": scheduler,
        "worker, without the model": [work - model for _, _, work, model in rows],
        "text and outputs": [whole - core for whole, core, _, _ in rows],
        "host work in all": [whole - model for whole, _, _, model in rows],
        "model": [model for *_, model in rows],
    }
    return {name: round(statistics.median(times) * 1e3, 3) for name, times in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--family", default="qwen2_vl", help="a family of tests/helpers/checkpoints.py")
    args = parser.parse_args()
    engine = make_engine(make_checkpoint(args.family), num_blocks=1024, max_num_seqs=args.batch)
    parts = measure(engine, args.batch, args.steps)
    for name, milliseconds in parts.items():
        print(f"{name:28s} {milliseconds:8.3f} ms per step")
    print(json.dumps({"batch": args.batch, "milliseconds": parts}))


if __name__ == "__main__":
    main()
