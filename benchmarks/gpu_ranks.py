"""Several GPUs that share one model: checks, then the gain over one GPU. `python benchmarks/gpu.py --ranks 2`.

Checks that float32 greedy tokens are those of one rank, with pictures, recorded passes and steps in flight, and that a
rank which is killed ends open requests with an error and the engine starts anew. Then measures, for each shape, decodes
of 1 and of 64 requests, the prefill of a long prompt and a burst of new pictures, on one GPU and on all, and how long
ranks take to add up rows of each size inside a graph. On a CPU (`--dry`) everything runs over gloo, at tiny sizes.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import torch

from benchmarks import gpu_checkpoints as checkpoints
from sensorium import EngineArgs, SamplingParams
from sensorium.engine.async_llm_engine import AsyncLLMEngine
from sensorium.errors import EngineDeadError

if TYPE_CHECKING:
    from benchmarks.gpu import Bench

TARGETS = {"decode_1": 1.6, "text_64": 1.7, "prefill": 1.7, "burst": 1.8}
"""How much faster than one GPU two are expected to be."""
SMALL = {"max_model_len": 2048, "num_blocks": 1024}
SUM_KIB = (8, 32, 128, 512, 2048, 8192, 32_768)
ONE_SHOT_KIB = 1024
"""Sums of up to this size are also measured in symmetric memory."""
SUMS_IN_GRAPH = 20


def run(bench: Bench, num_ranks: int) -> bool:
    """Check, measure, report. Returns whether the checks passed."""
    checks = {"equal": _are_equal(bench, num_ranks), "lost": asyncio.run(_ends_and_starts_anew(bench, num_ranks))}
    bench.report(f"{num_ranks} ranks", **{name: "yes" if passed else "NO" for name, passed in checks.items()})
    if not all(checks.values()):
        return False
    sums = _time_sums(bench, num_ranks)
    for shape in ["small"] if bench.is_dry else bench.options.shapes.split(","):
        alone, together = _measure(bench, shape, 1), _measure(bench, shape, num_ranks)
        gains = {name: alone[name] / together[name] for name in together}
        bench.report(f"{shape} gain of {num_ranks} ranks", **gains)
        for name, gain in gains.items():
            if num_ranks == 2 and not bench.is_dry and gain < TARGETS[name]:
                print(f"    {name}: {gain:.2f} is less than {TARGETS[name]}", flush=True)
        _report_share(bench, shape, num_ranks, sums, together)
    return True


# --- Checks ---


def _are_equal(bench: Bench, num_ranks: int) -> bool:
    """Whether greedy float32 tokens equal those of one rank, in two runs; in the second everything is cached."""
    from benchmarks.gpu import generate, picture, picture_prompt, token_ids

    count, num_tokens, most = (4, 6, 8) if bench.is_dry else (48, 24, 30)
    rng = random.Random(7)
    prompts: list[dict[str, Any]] = [{"prompt_token_ids": token_ids(20 + 9 * i, i)} for i in range(count)]
    for i in range(count):
        sides = [28 * rng.randint(2, most) for _ in range(2)]
        prompts.append(picture_prompt(picture(*sides, i), 600 + i, 20 + i))
    found = []
    for size in (1, num_ranks):
        llm = bench.load("small", tensor_parallel_size=size, **SMALL)
        found += [generate(llm, prompts, num_tokens)[0] for _ in range(2)]
        for line in llm.engine.report.lines():
            print(f"    {line}")
        llm.shutdown()
    num_equal = [sum(a == b for a, b in zip(found[0], tokens, strict=True)) for tokens in found[1:]]
    bench.report("equal", prompts=len(prompts), again=num_equal[0], ranks=num_equal[1], ranks_again=num_equal[2])
    return all(each == len(prompts) for each in num_equal)


async def _ends_and_starts_anew(bench: Bench, num_ranks: int) -> bool:
    """Kill a rank while requests are open: all must end with an error, and the next one must be answered as before."""
    from benchmarks.gpu import DEVICE, token_ids

    args = EngineArgs(
        str(bench.checkpoint("small")),
        device=DEVICE,
        tensor_parallel_size=num_ranks,
        skip_tokenizer_init=True,
        **SMALL,  # type: ignore[arg-type]
    )
    engine = await AsyncLLMEngine.start(args, max_restarts=1)
    try:
        before = await _answer(engine, token_ids(30, 1), 8)
        asked = [asyncio.create_task(_answer(engine, token_ids(30, i), 1500)) for i in range(8)]
        while not engine.load().num_open:
            await asyncio.sleep(0.01)
        await asyncio.sleep(1.0)
        begin = time.perf_counter()
        psutil.Process(engine.core_pid).children()[0].kill()
        results = await asyncio.gather(*asked, return_exceptions=True)
        seconds_to_end = time.perf_counter() - begin
        while engine.num_restarts == 0:
            await asyncio.sleep(0.01)
        after = await _answer(engine, token_ids(30, 1), 8)
        num_errors = sum(isinstance(each, EngineDeadError) for each in results)
        bench.report(
            "lost rank", ended=num_errors, end_s=seconds_to_end, anew_s=time.perf_counter() - begin, asked=len(asked)
        )
        return num_errors == len(asked) and before == after
    finally:
        await engine.shutdown()


async def _answer(engine: AsyncLLMEngine, ids: list[int], num_tokens: int) -> list[int]:
    tokens: list[int] = []
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    async for output in engine.generate({"prompt_token_ids": ids}, params):
        tokens = list(output.outputs[0].token_ids)  # type: ignore[union-attr]
    return tokens


# --- Speed ---


def _measure(bench: Bench, shape: str, num_ranks: int) -> dict[str, float]:
    """Seconds by measurement."""
    from benchmarks.gpu import decode, generate, picture, picture_prompt, prefill, token_ids

    print(f"{shape} on {num_ranks}:", flush=True)
    bench.checkpoint(shape)
    begin = time.perf_counter()
    llm = bench.load(shape, tensor_parallel_size=num_ranks)
    bench.report(f"{shape} load", s=time.perf_counter() - begin)
    batch = 4 if bench.is_dry else 64
    decode(bench, shape, llm, 1)
    decode(bench, shape, llm, batch)
    prefill(bench, shape, llm)
    count = 256 if bench.is_dry else 8192
    found = {
        "decode_1": bench.figures[f"{shape} decode 1"]["ms"] / 1e3,
        "prefill": bench.figures[f"{shape} prefill {count}"]["ms"] / 1e3,
    }
    length = 8 if bench.is_dry else 128
    times = []
    for repeat in range(3):
        prompts = [{"prompt_token_ids": token_ids(length, 4000 + 100 * repeat + i)} for i in range(batch)]
        times.append(generate(llm, prompts, length)[1])
    found["text_64"] = statistics.median(times)
    if checkpoints.takes_pictures(shape):
        side = 112 if bench.is_dry else 1024
        times, encoding = [], []
        for repeat in range(3):
            pictures = [picture(side, side, 40_000 + 100 * repeat + i) for i in range(batch)]
            before = llm.engine.core.stats().encode_s
            asked = [picture_prompt(each, 50_000 + 100 * repeat + i) for i, each in enumerate(pictures)]
            times.append(generate(llm, asked, 1)[1])
            encoding.append(llm.engine.core.stats().encode_s - before)
        found["burst"] = statistics.median(times)
        bench.report(f"{shape} burst of {batch}", s=found["burst"], encode_s=statistics.median(encoding))
    llm.shutdown()
    bench.figures = {
        f"{name} on {num_ranks}" if name.startswith(shape) and " on " not in name else name: figures
        for name, figures in bench.figures.items()
    }
    return found


def _report_share(bench: Bench, shape: str, num_ranks: int, sums: dict[int, float], together: dict[str, float]) -> None:
    """The time of sums in a step of one request, and the gain that remains if everything else is divided evenly."""
    sizes = checkpoints.SHAPES[shape]
    num_sums = 2 * sizes["layers"] + 1
    seconds = num_sums * sums[min(sums)]  # a row of any shape takes as long as the smallest size
    step = together["decode_1"]
    bench.report(
        f"{shape} sums in a decode of 1",
        number=num_sums,
        ms=seconds * 1e3,
        share=seconds / step,
        best_gain=num_ranks * (1 - seconds / step),
    )


def _time_sums(bench: Bench, num_ranks: int) -> dict[int, float]:
    """Seconds of a sum over ranks by size in KiB, measured in separate processes."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        arguments = [sys.executable, __file__]
        others = [
            subprocess.Popen([*arguments, str(rank), str(num_ranks), store], stdout=subprocess.DEVNULL)
            for rank in range(1, num_ranks)
        ]
        done = subprocess.run([*arguments, "0", str(num_ranks), store], stdout=subprocess.PIPE, check=True)
        for other in others:
            other.wait()
    times = json.loads(done.stdout.splitlines()[-1])
    for name, by_size in times.items():
        bench.report(f"{name}, us by KiB", **{size: seconds * 1e6 for size, seconds in by_size.items()})
    return {int(size): seconds for size, seconds in times["sums"].items()}


# --- A rank of `_time_sums` ---


def _sums_of_rank(rank: int, size: int, store: str) -> None:
    """Print how long sums take."""
    from torch import distributed

    from sensorium.distributed.nccl import ENVIRONMENT

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    is_gpu = torch.cuda.is_available()
    device = torch.device(f"cuda:{rank}" if is_gpu else "cpu")
    if is_gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if is_gpu else "gloo", store=distributed.FileStore(store, size), rank=rank, world_size=size
    )
    sizes = SUM_KIB if is_gpu else SUM_KIB[:3]
    times: dict[str, dict[int, float]] = {"sums": {}}
    for kib in sizes:
        rows = torch.ones(kib * 512, dtype=torch.bfloat16, device=device)
        times["sums"][kib] = _seconds(lambda: distributed.all_reduce(rows), is_gpu)  # noqa: B023
    if is_gpu:
        times["sums in symmetric memory"] = _one_shot([kib for kib in sizes if kib <= ONE_SHOT_KIB], device)
    print(json.dumps(times), flush=True)
    distributed.barrier()
    distributed.destroy_process_group()


def _one_shot(sizes: list[int], device: torch.device) -> dict[int, float]:
    """Each rank reads all ranks' rows and adds them up."""
    from torch import distributed
    from torch.distributed import _symmetric_memory as symmetric_memory

    name = distributed.group.WORLD.group_name  # type: ignore[union-attr]
    found = {}
    for kib in sizes:
        rows = symmetric_memory.empty(kib * 512, dtype=torch.bfloat16, device=device).fill_(1)
        symmetric_memory.rendezvous(rows, name)
        found[kib] = _seconds(lambda: torch.ops.symm_mem.one_shot_all_reduce(rows, "sum", name), True)  # noqa: B023
    return found


def _seconds(call: Callable[[], object], is_gpu: bool) -> float:
    """Median time of a call; on a GPU of one in a graph of many."""
    call()
    if not is_gpu:
        return statistics.median(_timed(call, lambda: None) for _ in range(5))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        for _ in range(SUMS_IN_GRAPH):
            call()
        graph.capture_end()
        graph.replay()
        stream.synchronize()
        return statistics.median(_timed(graph.replay, stream.synchronize) for _ in range(15)) / SUMS_IN_GRAPH


def _timed(call: Callable[[], object], wait: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - begin


if __name__ == "__main__":
    _sums_of_rank(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
