"""The effect of hostile grammars on other requests: gaps between the tokens of streams, with and without them.

    python benchmarks/hostile_grammars.py [--streams 4] [--tokens 400] [--senders 8]

A small random model streams from a core process of its own. Then it does so again while senders ask without pause for
outputs of grammars that overflow the stack, take all memory, take for ever, or mean nothing, and one client asks for
a harmless grammar now and then. Prints the gaps, how long refusals and the harmless ones took, and a line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import time
from collections import Counter
from typing import Any

from sensorium import EngineArgs, SamplingParams, StructuredOutputs
from sensorium.engine.async_llm_engine import AsyncLLMEngine
from sensorium.errors import RequestError
from tests.grammar.test_compiler import HOSTILE
from tests.helpers.checkpoints import make_checkpoint

SETTINGS: dict[str, Any] = {"device": "cpu", "num_blocks": 512, "max_num_seqs": 16, "max_model_len": 1024}


class Client:
    """Sends requests to one engine, and records times."""

    def __init__(self, engine: AsyncLLMEngine, num_tokens: int) -> None:
        self._engine = engine
        self._num_tokens = num_tokens
        self._numbers = itertools.count()
        self.gaps_s: list[float] = []
        self.refusals_s: list[float] = []
        self.harmless_s: list[float] = []
        self.refused: Counter[int] = Counter()

    async def stream(self, name: str) -> list[int]:
        params = SamplingParams(max_tokens=self._num_tokens, temperature=0.0, ignore_eos=True)
        token_ids: list[int] = []
        last_s = None
        async for output in self._engine.generate(name, params):
            now_s = time.perf_counter()
            if last_s is not None:
                self.gaps_s.append(now_s - last_s)
            last_s = now_s
            token_ids = list(output.outputs[0].token_ids)
        return token_ids

    async def send_hostile(self) -> None:
        while True:
            number = next(self._numbers)
            fields = dict(list(HOSTILE.values())[number % len(HOSTILE)])
            if "json" in fields:  # a new grammar each time, so that no result is cached
                schema = json.loads(fields["json"]) if isinstance(fields["json"], str) else fields["json"]
                fields["json"] = {**schema, "title": str(number)}
            begin_s = time.perf_counter()
            try:
                await self._ask(StructuredOutputs(**fields))
            except RequestError as error:
                self.refused[error.status] += 1
            self.refusals_s.append(time.perf_counter() - begin_s)

    async def send_harmless(self) -> None:
        while True:
            begin_s = time.perf_counter()
            await self._ask(StructuredOutputs(choice=[f"answer {next(self._numbers)}"]))
            self.harmless_s.append(time.perf_counter() - begin_s)
            await asyncio.sleep(0.2)

    async def _ask(self, grammar: StructuredOutputs) -> None:
        async for _ in self._engine.generate("Hi", SamplingParams(max_tokens=30, structured_outputs=grammar)):
            pass


def milliseconds(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    picked = {
        "median": statistics.median(ordered),
        "p99": ordered[int(0.99 * (len(ordered) - 1))],
        "worst": ordered[-1],
    }
    return {name: round(1e3 * value, 1) for name, value in picked.items()}


async def run(num_streams: int, num_tokens: int, num_senders: int) -> dict[str, Any]:
    engine = await AsyncLLMEngine.start(EngineArgs(str(make_checkpoint("qwen2")), **SETTINGS))
    names = [f"stream {i}" for i in range(num_streams)]
    try:
        warm = Client(engine, 20)
        await asyncio.gather(*map(warm.stream, names))
        await warm._ask(StructuredOutputs(json_object=True))
        quiet = Client(engine, num_tokens)
        expected = await asyncio.gather(*map(quiet.stream, names))
        beside = Client(engine, num_tokens)
        others = [asyncio.create_task(beside.send_hostile()) for _ in range(num_senders)]
        others.append(asyncio.create_task(beside.send_harmless()))
        begin_s = time.perf_counter()
        is_equal = True
        while time.perf_counter() - begin_s < 20.0:
            is_equal &= await asyncio.gather(*map(beside.stream, names)) == expected
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
    finally:
        await engine.shutdown()
    return {
        "gaps, quiet (ms)": milliseconds(quiet.gaps_s),
        "gaps, beside hostile grammars (ms)": milliseconds(beside.gaps_s),
        "refusals (ms)": milliseconds(beside.refusals_s),
        "harmless grammars, answered (ms)": milliseconds(beside.harmless_s),
        "refused, by status": dict(beside.refused),
        "streams equal": is_equal,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--senders", type=int, default=8)
    args = parser.parse_args()
    result = asyncio.run(run(args.streams, args.tokens, args.senders))
    for name, value in result.items():
        print(f"{name:34s} {value}")
    print(json.dumps({"hostile_grammars": result}))


if __name__ == "__main__":
    main()
