"""Streams keep their pace while prompts and images come in, on a machine whose speed is only known by measuring."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest

from sensorium.config import CacheConfig, SchedulerConfig
from sensorium.messages import SchedulerOutput
from sensorium.scheduler.pacing import MIN_PREFILL_TOKENS, UNBOUNDED, Pacer
from tests.scheduler.simulation import Limits, Simulation, make_request

GAP_S = 0.25


@dataclass
class Machine:
    """Costs of a CPU of the kind that takes a second for a picture and its prompt."""

    simulation: Simulation
    decode_s: float = 0.033
    token_s: float = 0.0019
    row_s: float = 0.0021
    last_step_s: float = 0.0

    def seconds(self, step: SchedulerOutput) -> tuple[float, float]:
        requests = self.simulation.requests
        rows = sum(requests[each.request_id].media[each.item].span.num_rows for each in step.encoder_inputs)
        tokens = self.num_prefill_tokens(step)
        encode_s, forward_s = self.row_s * rows, self.decode_s + self.token_s * tokens
        self.last_step_s = encode_s + forward_s
        return encode_s, forward_s

    def num_prefill_tokens(self, step: SchedulerOutput) -> int:
        slots = self.simulation.worker.slots
        return sum(c.num_scheduled_tokens for c in step.chunks if not slots[c.request_id].has_sampled)


def make_machine(seed: int = 0) -> Machine:
    limits = Limits(
        SchedulerConfig(max_token_gap_s=GAP_S),
        CacheConfig(encoder_cache_rows=5000),
        num_blocks=1500,
        max_model_len=9000,
    )
    simulation = Simulation(limits, seed=seed)
    machine = Machine(simulation)
    simulation.worker.seconds = machine.seconds
    return machine


def test_images_and_prompts_stand_between_tokens_no_longer_than_the_bound() -> None:
    rng, machine = Random(0), make_machine()
    simulation = machine.simulation
    gaps: list[float] = []
    num_prefill_steps = 0
    for i in range(260):
        if i % 15 == 0:
            parts: list[Sequence[Any]] = [[i] * rng.choice([3, 40, 600])]
            for k in range(rng.choice([0, 1, 3])):
                parts += [(f"image-{i}-{k}", (True,) * rng.choice([36, 64])), [k] * 5]
            simulation.add(make_request(f"r{i}", parts, max_tokens=80, ignore_eos=True))
        had_streams = any(slot.has_sampled for slot in simulation.worker.slots.values())
        step = simulation.step()
        num_prefill_steps += step.num_scheduled_tokens > len(step.chunks)
        if had_streams and i > 30:
            gaps.append(machine.last_step_s)
    assert num_prefill_steps > 50
    assert max(gaps) <= GAP_S
    assert sorted(gaps)[-10] > 0.8 * GAP_S, "and the time there is gets used"
    simulation.finish()


def test_an_item_that_takes_longer_than_the_bound_comes_one_to_a_step() -> None:
    machine = make_machine()
    simulation = machine.simulation
    simulation.add(make_request("stream", [[1] * 40], max_tokens=60, ignore_eos=True))
    for _ in range(3):
        simulation.step()
    for i in range(4):
        simulation.add(make_request(f"r{i}", [(f"image{i}", (True,) * 300), [i] * 5], max_tokens=1))
    for _ in range(45):
        step = simulation.step()
        assert "stream" in {chunk.request_id for chunk in step.chunks}
        assert len(step.encoder_inputs) <= 1
        if step.encoder_inputs:
            assert step.num_scheduled_tokens <= 1 + MIN_PREFILL_TOKENS
    assert sum(len(step.encoder_inputs) for step in simulation.steps) == 4
    simulation.finish()


@pytest.mark.parametrize("slowness", [1.0, 100.0])
def test_prefill_advances_in_every_step_however_slow_the_machine(slowness: float) -> None:
    machine = make_machine()
    machine.decode_s *= slowness
    machine.token_s *= slowness
    simulation = machine.simulation
    simulation.add(make_request("stream", [[1] * 40], max_tokens=80, ignore_eos=True))
    simulation.step()
    simulation.add(make_request("long", [[2] * 1000], max_tokens=1))
    while not simulation.outcomes["long"].final:
        step = simulation.step()
        share = [c.num_scheduled_tokens for c in step.chunks if c.request_id == "long"]
        assert share
        assert share[0] >= MIN_PREFILL_TOKENS or step.chunks[-1].is_last
    simulation.finish()


def test_without_streams_nothing_is_held_back() -> None:
    machine = make_machine()
    machine.token_s = 1.0
    simulation = machine.simulation
    simulation.add(make_request("long", [[2] * 2000], max_tokens=1))
    assert simulation.step().num_scheduled_tokens == 2000
    simulation.finish()


def test_an_infinite_gap_bounds_nothing() -> None:
    """Offline nobody reads along, however long a step is known to take."""
    pace = Pacer(math.inf, decode_s=10.0, token_s=10.0, row_s=10.0).begin_step(has_streams=True)
    assert pace.token_room(extra_rows=1000) == UNBOUNDED
    assert pace.admits_rows(10_000, 10_000)
