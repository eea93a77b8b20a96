"""Preparation takes turns: 256 long prompts of one tenant don't stand before another's short one."""

from __future__ import annotations

import asyncio
from random import Random

from sensorium.engine.fair_turns import FairTurns


def test_tenants_take_turns_and_each_is_served_first_come_first_served() -> None:
    async def run() -> list[str]:
        turns, served = FairTurns(1), []

        async def work(name: str) -> None:
            async with turns.turn(name[0]):
                served.append(name)
                await asyncio.sleep(0)

        names = [*(f"a{i}" for i in range(5)), *(f"b{i}" for i in range(2)), "c0"]
        await asyncio.gather(*map(work, names))
        return served

    assert asyncio.run(run()) == ["a0", "a1", "b0", "c0", "a2", "b1", "a3", "a4"]


def test_so_many_at_once_whoever_gives_up() -> None:
    async def run(seed: int) -> None:
        rng, turns, num_now = Random(seed), FairTurns(3), 0

        async def work(tenant: str) -> None:
            nonlocal num_now
            async with turns.turn(tenant):
                num_now += 1
                assert num_now <= 3
                try:
                    for _ in range(rng.randint(0, 3)):
                        await asyncio.sleep(0)
                finally:
                    num_now -= 1

        async def give_up_some() -> None:
            for task in tasks:
                await asyncio.sleep(0)
                if rng.random() < 0.4:
                    task.cancel()

        tasks = [asyncio.create_task(work(rng.choice("abc"))) for _ in range(60)]
        await give_up_some()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(each is None or isinstance(each, asyncio.CancelledError) for each in results)
        assert not turns._waiting
        assert turns._num_left == 3

    async def idle_again() -> None:
        turns = FairTurns(2)
        async with turns.turn("a"), turns.turn("a"):
            waiting = [asyncio.create_task(turns.turn(name).__aenter__()) for name in "ab"]
            await asyncio.sleep(0)
            for each in waiting:
                each.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        assert turns._num_left == 2

    for seed in range(20):
        asyncio.run(run(seed))
    asyncio.run(idle_again())


def test_a_turn_that_comes_while_its_owner_gives_up_goes_on() -> None:
    async def run() -> None:
        turns = FairTurns(1)
        async with turns.turn("a"):
            first, second = (asyncio.create_task(_hold(turns, name)) for name in "bc")
            await asyncio.sleep(0)
        first.cancel()  # its turn has come, and it doesn't know yet
        assert await second == "c"
        assert turns._num_left == 1

    asyncio.run(run())


async def _hold(turns: FairTurns, name: str) -> str:
    async with turns.turn(name):
        return name
