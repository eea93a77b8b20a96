"""Tenants share the slots: nobody's single request waits until all of somebody else's are done.

One body with n=64 took every slot and the line behind them, and another API key's single token waited for all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest

from sensorium.config import SchedulerConfig
from sensorium.scheduler.fair_shares import FairShares
from sensorium.scheduler.request import RequestState
from tests.scheduler.simulation import Limits, Simulation, make_request


class Line:
    """Requests in the order of their shares, without a scheduler."""

    def __init__(self, policy: str = "fcfs") -> None:
        self.shares = FairShares(policy, max_model_len=1000)
        self.waiting: list[RequestState] = []
        self.running: list[RequestState] = []

    def add(self, name: str, *, max_tokens: int | None = 50, priority: int = 0, prompt: int = 10) -> RequestState:
        """A request called `a1` is tenant a's."""
        message = make_request(name, [[1] * prompt], tenant=name[0], max_tokens=max_tokens, priority=priority)
        state = RequestState(message, self.shares.arrive(message), 1000)
        self.waiting.append(state)
        return state

    def start(self) -> str:
        """The name of the request that is served next."""
        best = min(self.waiting, key=lambda each: each.order)
        self.waiting.remove(best)
        self.shares.start(best)
        self.running.append(best)
        return best.request_id

    def end(self, request: RequestState) -> None:
        (self.waiting if request in self.waiting else self.running).remove(request)
        self.shares.end(request)

    def all(self) -> list[str]:
        return [self.start() for _ in range(len(self.waiting))]


def test_one_tenants_requests_are_served_first_come_first_served() -> None:
    """Whatever they cost, however many are given up, and whatever others do."""
    rng, line = Random(0), Line()
    last: dict[str, int] = {}
    for i in range(3000):
        act = rng.random()
        if act < 0.5:
            line.add(f"{rng.choice('abc')}{i}", max_tokens=rng.choice([1, 50, 500, None]), prompt=rng.choice([1, 100]))
        elif act < 0.75 and line.waiting:
            name = line.start()
            tenant, number = name[0], int(name[1:])
            assert number > last.get(tenant, -1)
            last[tenant] = number
        elif line.waiting + line.running:
            line.end(rng.choice(line.waiting + line.running))
    for request in line.waiting + line.running:
        line.shares.end(request)
    line.shares.check_idle()


def test_the_example_of_the_module() -> None:
    line = Line()
    for name in ("a1", "a2", "a3", "a4"):
        line.add(name, max_tokens=90)
    assert [line.start(), line.start()] == ["a1", "a2"]
    for name in ("b1", "b2"):
        line.add(name, max_tokens=90)
    assert line.all() == ["b1", "a3", "b2", "a4"]


def test_shares_are_of_tokens_and_not_of_requests() -> None:
    line = Line()
    for i in range(10):
        line.add(f"a{i}", max_tokens=390)
    for i in range(40):
        line.add(f"b{i}", max_tokens=90)
    served = [line.start() for _ in range(25)]
    assert 4 <= sum(name[0] == "a" for name in served) <= 6


def test_what_was_given_up_costs_nothing() -> None:
    """A client whose thousand requests were given up waits no longer for that."""
    line = Line()
    given_up = [line.add(f"a{i}") for i in range(1000)]
    for request in given_up:
        line.end(request)
    for i in range(5):
        line.add(f"b{i}")
    line.add("a1000")
    assert line.all().index("a1000") <= 1


def test_who_comes_back_has_saved_up_no_turns() -> None:
    line = Line()
    for i in range(50):
        line.add(f"a{i}")
    for _ in range(40):
        line.start()
    for i in range(10):
        line.add(f"b{i}")
    served = line.all()
    assert max(i for i, name in enumerate(served[:18]) if name[0] == "a") > 10, "a is served beside b"
    assert [name[0] for name in served[:10]].count("a") >= 4


def test_a_tenant_that_asks_one_by_one_is_not_served_before_all_others() -> None:
    line = Line()
    for i in range(20):
        line.add(f"a{i}")
    names = []
    for i in range(20):
        request = line.add(f"b{i}")
        while request in line.waiting:
            names.append(line.start())
            line.end(line.running[-1])
        if len(names) > 20:
            break
    assert 8 <= sum(name[0] == "a" for name in names[:20]) <= 12


def test_priorities_come_first_and_only_where_they_are_the_policy() -> None:
    for policy, expected in (("priority", ["a2", "b1", "a1"]), ("fcfs", ["a1", "b1", "a2"])):
        line = Line(policy)
        line.add("a1", priority=5)
        line.add("a2", priority=0)
        line.add("b1", priority=0)
        assert line.all() == expected


def test_a_full_line_has_room_for_who_has_less_than_a_share() -> None:
    line = Line()
    for i in range(8):
        assert line.shares.has_room("a", len(line.waiting), 8)
        line.add(f"a{i}")
    assert not line.shares.has_room("a", 8, 8)
    for i in range(4):
        assert line.shares.has_room("b", len(line.waiting), 8)
        line.add(f"b{i}")
    assert not line.shares.has_room("b", len(line.waiting), 8)
    assert line.shares.has_room("c", len(line.waiting), 8)


def served_before(simulation: Simulation, name: str, others: Sequence[str]) -> int:
    """How many of the others have ended when a request has."""
    while simulation.outcomes[name].final is None:
        simulation.step()
    return sum(simulation.outcomes[other].final is not None for other in others)


@pytest.mark.parametrize("num_slots", [1, 4])
@pytest.mark.parametrize("in_flight", [1, 3])
def test_a_request_waits_for_a_slot_and_not_for_all_of_another_tenants(num_slots: int, in_flight: int) -> None:
    config = SchedulerConfig(max_num_seqs=num_slots, max_num_batched_tokens=64, max_steps_in_flight=in_flight)
    simulation = Simulation(Limits(config, num_blocks=64))
    flood = [f"b{i}" for i in range(64)]
    for name in flood:
        simulation.add(make_request(name, [[1, 2, 3]], tenant="b", max_tokens=20, ignore_eos=True))
    for _ in range(5):
        simulation.step()
    simulation.add(make_request("a", [[7, 8]], tenant="a", max_tokens=1))
    assert served_before(simulation, "a", flood) <= 2 * num_slots
    simulation.finish()


def test_without_tenants_a_flood_is_served_first() -> None:
    """What shares change: this is how it was for all."""
    simulation = Simulation(Limits(SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64), num_blocks=64))
    flood = [f"b{i}" for i in range(64)]
    for name in flood:
        simulation.add(make_request(name, [[1, 2, 3]], max_tokens=20, ignore_eos=True))
    simulation.add(make_request("a", [[7, 8]], max_tokens=1))
    assert served_before(simulation, "a", flood) > 50
    simulation.finish()


def test_a_line_filled_by_one_tenant_lets_another_in() -> None:
    limits = Limits(SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=64, max_waiting_requests=8), num_blocks=64)
    simulation = Simulation(limits)
    while simulation.add(make_request(f"b{len(simulation.requests)}", [[1, 2, 3]], tenant="b")):
        pass
    assert len(simulation.requests) == 8
    assert simulation.add(make_request("a", [[7, 8]], tenant="a"))
    simulation.finish()
