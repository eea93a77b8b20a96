"""Every way of starting an engine works in a process that has imported nothing before.

A core in a thread of the server's process once ended in "cannot import name ... from partially initialized module":
it imported transformers while the front did. The tests had imported all of it beforehand and saw nothing.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAD = """
import asyncio, threading
from concurrent.futures import ThreadPoolExecutor
from sensorium import EngineArgs, LLM, LLMEngine, SamplingParams
SETTINGS = {"num_blocks": 64, "num_threads": 1, "max_model_len": 512}
ARGS = EngineArgs("demo", **SETTINGS)
GREEDY = SamplingParams(temperature=0, max_tokens=2)

def answer(llm):
    return llm.generate("Hello", GREEDY)[0].outputs[0].token_ids

async def ask(engine):
    async for output in engine.generate("Hello", GREEDY):
        last = output
    await engine.shutdown()
    return last.outputs[0].token_ids
"""

WAYS = {
    "core in a thread": """
from sensorium.engine.async_llm_engine import AsyncLLMEngine
from sensorium.engine.core_client import IN_THIS_PROCESS
async def main():
    return await ask(await AsyncLLMEngine.start(ARGS, make_core=IN_THIS_PROCESS))
print(len(asyncio.run(main())))
""",
    "three cores in threads": """
from sensorium.engine.async_llm_engine import AsyncLLMEngine
from sensorium.engine.core_client import IN_THIS_PROCESS
async def main():
    starts = [AsyncLLMEngine.start(ARGS, make_core=IN_THIS_PROCESS) for _ in range(3)]
    return await asyncio.gather(*[ask(engine) for engine in await asyncio.gather(*starts)])
assert len(set(map(tuple, found := asyncio.run(main())))) == 1
print(len(found[0]))
""",
    "core in a process beside an LLM": """
from sensorium.engine.async_llm_engine import AsyncLLMEngine
async def main():
    llm, engine = await asyncio.gather(asyncio.to_thread(LLM, "demo", **SETTINGS), AsyncLLMEngine.start(ARGS))
    found = await ask(engine)
    assert tuple(found) == tuple(answer(llm))
    return found
print(len(asyncio.run(main())))
""",
    "LLM, LLMEngine and settings in threads": """
with ThreadPoolExecutor(3) as pool:
    resolved, engine = pool.submit(ARGS.create_engine_config), pool.submit(LLMEngine.from_engine_args, ARGS)
    llm = pool.submit(LLM, "demo", **SETTINGS)
assert resolved.result().model_config.max_model_len == 512 and engine.result().report.num_blocks == 64
print(len(answer(llm.result())))
""",
    "the server's application": """
from sensorium.engine.core_client import IN_THIS_PROCESS
from sensorium.entrypoints.openai.server import running_app
async def main():
    async with running_app(ARGS, make_core=IN_THIS_PROCESS) as (app, engine):
        return await ask(engine)
print(len(asyncio.run(main())))
""",
}


@pytest.mark.parametrize("way", WAYS)
def test_an_engine_starts_without_its_callers_imports(way: str) -> None:
    done = subprocess.run([sys.executable, "-c", HEAD + WAYS[way]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2"
