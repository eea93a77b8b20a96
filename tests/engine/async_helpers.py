"""What the tests of the asynchronous engine share: engines over tiny checkpoints, and readers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sensorium import EngineArgs, SamplingParams
from sensorium.engine.async_llm_engine import AsyncLLMEngine
from sensorium.engine.core_client import IN_THIS_PROCESS
from sensorium.outputs import RequestOutput
from tests.helpers.waiting import auntil

SETTINGS: dict[str, Any] = {"device": "cpu", "num_blocks": 256, "max_num_seqs": 16, "max_model_len": 512}


@asynccontextmanager
async def running(path: Path, *, in_process: bool = True, **settings: Any) -> AsyncIterator[AsyncLLMEngine]:
    """An engine that is shut down at the end."""
    args = EngineArgs(model=str(path), **{**SETTINGS, **settings})
    engine = await AsyncLLMEngine.start(args, make_core=IN_THIS_PROCESS if in_process else None)
    try:
        yield engine
    finally:
        await engine.shutdown()


async def last(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    """Read to the end."""
    result = None
    async for output in outputs:
        result = output
    assert result is not None
    assert result.finished
    return result


def greedy(max_tokens: int = 8, **fields: Any) -> SamplingParams:
    """Parameters whose tokens are known beforehand."""
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **fields)


async def settled(engine: AsyncLLMEngine) -> None:
    """Wait until nothing of any request is left, in the front and in the core."""
    await auntil(lambda: not engine.load().num_open and engine.stats is not None and not _is_busy(engine))


def _is_busy(engine: AsyncLLMEngine) -> bool:
    stats = engine.stats
    assert stats is not None
    return bool(stats.num_running or stats.num_waiting or stats.kv_cache_usage)
