"""Bytes that all requests share: bounded together, given back with the last reference, open to the only one."""

from __future__ import annotations

import threading

import pytest

from sensorium.errors import OverloadedError
from sensorium.media import MediaBudget, MediaFetcher, MediaLoader


def test_bytes_are_bounded_together_and_come_back() -> None:
    budget = MediaBudget(100)
    first, second = budget.lease(60), budget.lease(40)
    with pytest.raises(OverloadedError, match="waiting media") as caught:
        second.grow(1)
    assert caught.value.retry_after_s == 2.0
    assert budget.num_bytes == 100
    first.release()
    first.release()
    second.grow(60)
    del second, caught  # the error holds the frames that it passed through
    assert budget.num_bytes == 0


def test_the_only_holder_may_have_more_than_the_bound() -> None:
    budget = MediaBudget(100)
    only = budget.lease(500)
    only.grow(500)
    with pytest.raises(OverloadedError):
        budget.lease(1)
    del only
    assert budget.lease(1)


def test_what_only_garbage_holds_refuses_nobody() -> None:
    budget = MediaBudget(100)
    cycle: list[object] = [budget.lease(100)]
    cycle.append(cycle)
    del cycle
    assert budget.lease(100)


def test_many_threads_end_where_they_began() -> None:
    budget = MediaBudget(1000)

    def work() -> None:
        for _ in range(500):
            try:
                lease = budget.lease(300)
                lease.grow(100)
            except OverloadedError:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert budget.num_bytes == 0


def test_fetched_media_hold_their_bytes_for_as_long_as_they_are_there() -> None:
    budget = MediaBudget(1000)
    media = MediaLoader(budget=budget).encoded("image", b"x" * 300)
    assert budget.num_bytes == 300
    with pytest.raises(OverloadedError):
        MediaFetcher(budget=budget).fetch(b"x" * 800, "image")
    del media
    assert budget.num_bytes == 0
