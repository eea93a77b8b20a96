"""Requests that are given up at every moment of their life, among some that are not.

    python benchmarks/abort_storm.py --requests 2000

Starts an engine with its core in a process of its own, lets that many readers of prompts with and without a picture go
away at random, and checks that the patient ones' tokens equal those of a quiet run and that blocks, requests, open
files and memory are back where they were. Ends with one JSON line; exits with status 1 if anything is not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import time
from typing import Any

import numpy as np
from PIL import Image

from sensorium import EngineArgs, SamplingParams
from sensorium.engine.async_llm_engine import AsyncLLMEngine

NUM_PATIENT = 20
MAX_TOKENS = 24
NUM_PICTURES = 16


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def prompt(index: int, placeholder: str) -> Any:
    if index % 2:
        return f"Say something about the number {index % 50}."
    return {"prompt": f"{placeholder}What is it?", "multi_modal_data": {"image": picture(index % NUM_PICTURES)}}


async def tokens(engine: AsyncLLMEngine, asked: Any) -> list[int]:
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
    ids: list[int] = []
    async for output in engine.generate(asked, params):
        ids = output.outputs[0].token_ids
    return ids


async def impatient(engine: AsyncLLMEngine, asked: Any, after_s: float) -> bool:
    """Whether it finished before its patience ended."""
    try:
        async with asyncio.timeout(after_s):
            await tokens(engine, asked)
    except TimeoutError:
        return False
    return True


async def settle(engine: AsyncLLMEngine) -> float:
    """Seconds until nothing was left of any request."""
    start_s = time.monotonic()
    while engine.load().num_open or engine.stats is None or engine.stats.num_running or engine.stats.num_waiting:
        await asyncio.sleep(0.01)
    return time.monotonic() - start_s


def resident_mib(pid: int) -> float:
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def footprint(engine: AsyncLLMEngine) -> dict[str, float]:
    pids = {"front": os.getpid(), "core": engine.core_pid}
    files = {f"{name}_open_files": len(os.listdir(f"/proc/{pid}/fd")) for name, pid in pids.items()}
    return {**files, **{f"{name}_mib": round(resident_mib(pid), 1) for name, pid in pids.items()}}


async def storm(engine: AsyncLLMEngine, num_requests: int, placeholder: str, seed: int) -> tuple[list[list[int]], int]:
    rng = random.Random(seed)
    async with asyncio.TaskGroup() as group:
        patient = [group.create_task(tokens(engine, prompt(index, placeholder))) for index in range(NUM_PATIENT)]
        others = []
        for index in range(num_requests):
            asked = prompt(rng.randrange(1000), placeholder)
            others.append(group.create_task(impatient(engine, asked, rng.expovariate(1.0))))
            if index % 50 == 0:
                await asyncio.sleep(0.1)
    return [task.result() for task in patient], sum(not task.result() for task in others)


async def run(args: argparse.Namespace) -> int:
    settings: dict[str, Any] = {"device": args.device, "max_model_len": 512}
    engine = await AsyncLLMEngine.start(EngineArgs(model=args.model, **settings), log_level="WARNING")
    try:
        quiet = [await tokens(engine, prompt(index, args.placeholder)) for index in range(NUM_PATIENT)]
        await storm(engine, 200, args.placeholder, seed=1)  # fills pools and caches
        await settle(engine)
        before = footprint(engine)
        start_s = time.monotonic()
        answers, num_aborted = await storm(engine, args.requests, args.placeholder, seed=2)
        seconds, settled_s = time.monotonic() - start_s, await settle(engine)
        await asyncio.sleep(1.0)
        after, stats = footprint(engine), engine.stats
    finally:
        await engine.shutdown()
    assert stats is not None
    checks = {
        "exact": answers == quiet,
        "blocks_free": stats.num_free_blocks == stats.num_blocks,
        "files_back": all(after[key] <= before[key] for key in before if key.endswith("files")),
    }
    figures = {"requests": args.requests, "aborted": num_aborted, "seconds": round(seconds, 1), **checks}
    print(json.dumps({**figures, "settled_s": round(settled_s, 3), "before": before, "after": after}))
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--placeholder", default="<|vision_bos|><|IMAGE|><|vision_eos|>", help="text of an image")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--device", default="auto")
    raise SystemExit(asyncio.run(run(parser.parse_args())))
