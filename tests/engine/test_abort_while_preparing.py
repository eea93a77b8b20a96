"""A request that is aborted before it has reached the core: nothing goes on for it."""

from __future__ import annotations

import asyncio

import pytest

from sensorium.engine.args import EngineArgs
from sensorium.engine.async_llm_engine import AsyncLLMEngine
from sensorium.engine.core_client import IN_THIS_PROCESS
from sensorium.errors import RequestAbortedError
from sensorium.media import DecoderPool, EncodedMedia, MediaLimits, MediaLoader
from tests.engine.async_helpers import SETTINGS, greedy, last
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.waiting import auntil
from tests.media.samples import many_scans


def test_an_abort_ends_the_decoding_of_a_requests_media() -> None:
    """Its reader was told at once, and the picture was decoded for a minute more, in nobody's name."""
    limits = MediaLimits(decode_processes=1)
    pool = DecoderPool(limits)
    slow = {"prompt": "a", "multi_modal_data": {"image": EncodedMedia("image", many_scans(6_500, side=1_000))}}

    async def run() -> None:
        args = EngineArgs(str(make_checkpoint("qwen2_vl")), **SETTINGS)
        loader = MediaLoader(limits, decoders=pool)
        engine = await AsyncLLMEngine.start(args, media_loader=loader, make_core=IN_THIS_PROCESS)
        reader = asyncio.create_task(last(engine.generate(slow, greedy(), "one")))
        await auntil(lambda: any(decoder.job for decoder in pool._decoders))
        engine.abort("one")
        with pytest.raises(RequestAbortedError):
            await reader
        await auntil(lambda: not any(decoder.job for decoder in pool._decoders))
        await engine.shutdown()

    try:
        asyncio.run(run())
    finally:
        pool.close()


def test_an_abort_takes_a_request_out_of_the_line_for_the_pool() -> None:
    async def run() -> None:
        args = EngineArgs(str(make_checkpoint("llama")), **SETTINGS)
        engine = await AsyncLLMEngine.start(args, make_core=IN_THIS_PROCESS)
        prepared = []
        held = engine._turns._num_left
        engine._turns._num_left = 0  # others have all turns
        engine.preprocessor.process = lambda *given, **_: prepared.append(given)  # type: ignore[assignment]
        reader = asyncio.create_task(last(engine.generate("a", greedy(), "one")))
        await auntil(lambda: bool(engine._turns._waiting))
        engine.abort("one")
        with pytest.raises(RequestAbortedError):
            await reader
        engine._turns._give_on()
        assert engine._turns._num_left == 1
        engine._turns._num_left = held
        assert not engine.load().num_open
        await engine.shutdown()
        assert not prepared

    asyncio.run(run())
