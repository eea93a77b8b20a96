"""The line's order, and who may take whose place."""

from __future__ import annotations

from random import Random

from sensorium.scheduler.request import RequestState, RequestStatus
from sensorium.scheduler.request_table import RequestQueue, may_displace
from tests.scheduler.simulation import make_request


def make_state(order: tuple[int, int, int], status: RequestStatus = RequestStatus.WAITING) -> RequestState:
    state = RequestState(make_request(f"r{order}", [[1]]), order, 100)
    state.status = status
    return state


def test_the_line_is_sorted_whatever_comes_and_goes() -> None:
    rng, queue = Random(0), RequestQueue()
    states = [make_state((rng.randint(0, 3), rng.randint(0, 3), i)) for i in range(40)]
    inside: list[RequestState] = []
    for _ in range(400):
        state = rng.choice(states)
        if state in inside:
            queue.remove(state)
            inside.remove(state)
        else:
            queue.push(state)
            inside.append(state)
        expected = sorted(inside, key=lambda each: each.order)
        assert [queue.peek(i) for i in range(len(queue))] == expected
    assert queue.peek(len(queue)) is None


def test_running_requests_take_from_any_behind_and_waiting_ones_from_a_worse_priority() -> None:
    running, waiting = RequestStatus.RUNNING, RequestStatus.WAITING
    assert may_displace(make_state((0, 0, 1), running), make_state((0, 0, 2), running))
    assert not may_displace(make_state((0, 0, 2), running), make_state((0, 0, 1), running))
    assert not may_displace(make_state((0, 0, 1), waiting), make_state((0, 0, 2), running))
    assert may_displace(make_state((0, 0, 2), waiting), make_state((1, 0, 1), running))
    assert not may_displace(make_state((1, 0, 1), waiting), make_state((0, 0, 2), running))
