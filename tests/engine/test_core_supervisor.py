"""A dead core is replaced as often as allowed; whoever asked it is told; nothing is left of it."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from sensorium.config import ModelFeatures
from sensorium.engine.args import EngineArgs
from sensorium.engine.async_llm_engine import AsyncLLMEngine
from sensorium.engine.core_supervisor import CoreSupervisor
from sensorium.errors import EngineDeadError, EngineRestartingError, ModelError
from sensorium.messages import LoadReport
from sensorium.structured_outputs import StructuredOutputs
from tests.engine.async_helpers import SETTINGS, greedy, last, settled
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.waiting import auntil
from tests.scheduler.simulation import full_attention


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_killed_core_is_replaced_and_answers_as_before() -> None:
    checkpoint = make_checkpoint("qwen2_vl")

    async def run() -> None:
        args = EngineArgs(str(checkpoint), **{**SETTINGS, "num_blocks": None, "kv_cache_bytes": 1 << 20})
        engine = await AsyncLLMEngine.start(args, max_restarts=1)
        try:
            before = await last(engine.generate("Only text", greedy()))
            held = greedy(20, structured_outputs=StructuredOutputs(choice=["yes", "no"]))
            held_before = await last(engine.generate("Only text", held))
            files, first = open_files(), engine.core_pid
            readers = [asyncio.create_task(last(engine.generate("Go on", greedy(480)))) for _ in range(4)]
            await auntil(lambda: engine.load().num_open == 4 and not engine.load().num_waiting)
            os.kill(first, signal.SIGKILL)
            for result in await asyncio.gather(*readers, return_exceptions=True):
                assert isinstance(result, EngineRestartingError)
                assert result.status == 503
            assert not engine.is_running
            assert not engine.has_ended
            with pytest.raises(EngineRestartingError, match="is being started anew"):
                await last(engine.generate("Anyone?"))
            await auntil(lambda: engine.is_running)
            assert (engine.num_restarts, engine.core_pid == first) == (1, False)
            assert not Path(f"/proc/{first}").exists()
            after = await last(engine.generate("Only text", greedy()))
            assert after.outputs[0].token_ids == before.outputs[0].token_ids
            held_after = await last(engine.generate("Only text", held))
            assert held_after.outputs[0].text == held_before.outputs[0].text
            await settled(engine)
            assert open_files() == files

            os.kill(engine.core_pid, signal.SIGKILL)
            await auntil(lambda: engine.has_ended)
            with pytest.raises(EngineDeadError, match="without a message"):
                await engine.check_health()
        finally:
            await engine.shutdown()

    asyncio.run(run())


class FakeCore:
    """As much of a core as one needs that never gets a request."""

    report = LoadReport(ModelFeatures(), full_attention(8, 16), {}, {})
    idle_check_s = None

    def has_unfinished_requests(self) -> bool:
        return False

    def use_idle_time(self) -> bool:
        return False

    def shutdown(self) -> None:
        pass


class Factory:
    """Makes cores, each as its turn says: fit, another model, or none at all."""

    def __init__(self, *turns: str) -> None:
        self.turns = list(turns)
        self.args: list[EngineArgs] = []

    def __call__(self, args: EngineArgs) -> Any:
        self.args.append(args)
        turn = self.turns.pop(0)
        if turn == "fails":
            raise ModelError("no such luck")
        core = FakeCore()
        if turn == "other":
            core.report = LoadReport(ModelFeatures(tier="1"), full_attention(8, 16), {}, {})
        return core


async def supervised(factory: Factory, max_restarts: int) -> tuple[CoreSupervisor, list[EngineDeadError]]:
    deaths: list[EngineDeadError] = []
    supervisor = CoreSupervisor(
        EngineArgs("m"), lambda news: None, deaths.append, make=factory, max_restarts=max_restarts, delay_s=0.01
    )
    await supervisor.ready()
    return supervisor, deaths


def kill(supervisor: CoreSupervisor) -> None:
    supervisor._client._closed()  # what the channel calls when the other end is gone


def test_failed_loads_count_and_the_last_is_the_end() -> None:
    async def run() -> None:
        factory = Factory("fit", "fails", "fails", "fit")
        supervisor, deaths = await supervised(factory, 2)
        kill(supervisor)
        await auntil(lambda: supervisor.has_ended)
        assert [type(death) for death in deaths] == [EngineRestartingError]
        assert "2 new ones in a row could not start" in str(supervisor.failure)
        assert supervisor.num_restarts == 0
        await supervisor.stop()

    asyncio.run(run())


def test_a_failed_load_is_followed_by_another_one_with_as_much_memory() -> None:
    async def run() -> None:
        factory = Factory("fit", "fails", "fit")
        supervisor, _ = await supervised(factory, 2)
        kill(supervisor)
        assert supervisor.failure is not None
        await auntil(lambda: supervisor.failure is None)
        assert supervisor.num_restarts == 1
        assert [args.num_blocks for args in factory.args] == [None, 8, 8]
        await supervisor.stop()

    asyncio.run(run())


def test_deaths_in_a_row_are_bounded_and_long_life_forgives() -> None:
    async def run() -> None:
        supervisor, deaths = await supervised(Factory(*["fit"] * 4), 1)
        kill(supervisor)
        await auntil(lambda: supervisor.failure is None)
        supervisor._ready_time_s -= 3600
        kill(supervisor)
        await auntil(lambda: supervisor.failure is None)
        kill(supervisor)
        assert supervisor.has_ended
        assert [type(death) for death in deaths] == [EngineRestartingError, EngineRestartingError, EngineDeadError]
        await supervisor.stop()

    asyncio.run(run())


def test_another_model_is_not_taken() -> None:
    async def run() -> None:
        supervisor, _ = await supervised(Factory("fit", "other"), 5)
        kill(supervisor)
        await auntil(lambda: supervisor.has_ended)
        assert "not the same" in str(supervisor.failure)
        await supervisor.stop()

    asyncio.run(run())


def test_stopping_ends_a_restart_under_way() -> None:
    async def run() -> None:
        files = open_files()
        supervisor, _ = await supervised(Factory(*["fit"] * 3), 2)
        kill(supervisor)
        await asyncio.sleep(0)
        await supervisor.stop()
        assert open_files() <= files + 1  # the loop's pool may have made a pipe

    asyncio.run(run())
