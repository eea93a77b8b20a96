"""The processor cache: one computation per key, bounded bytes, failures that stay with their owner."""

from __future__ import annotations

import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sensorium.multimodal.processor_cache import ProcessorCache, nested_bytes
from tests.helpers.waiting import HANG_S

KIB = 1024


def value_of(num_bytes: int) -> dict[str, Any]:
    return {"pixel_values": np.zeros(num_bytes, dtype=np.uint8)}


def unexpected() -> Any:
    raise AssertionError("computed although the value was at hand")


def test_a_second_request_gets_the_first_one_s_value() -> None:
    cache = ProcessorCache(KIB * KIB)
    first = cache.get_or_compute("a", lambda: value_of(10))
    assert cache.get_or_compute("a", unexpected) is first
    statistics = cache.statistics()
    assert (statistics.hits, statistics.misses, statistics.num_items) == (1, 1, 1)


def test_requests_for_one_key_share_one_computation() -> None:
    cache = ProcessorCache(KIB * KIB)
    started, release = threading.Event(), threading.Event()
    calls = []

    def compute() -> dict[str, Any]:
        calls.append(1)
        started.set()
        assert release.wait(HANG_S)
        return value_of(10)

    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(cache.get_or_compute, "a", compute)
        assert started.wait(HANG_S)
        others = [pool.submit(cache.get_or_compute, "a", unexpected) for _ in range(7)]
        assert cache.get_or_compute("b", lambda: value_of(1)) is not None  # another key isn't held up
        time.sleep(0.05)
        release.set()
        assert {id(other.result(HANG_S)) for other in others} == {id(first.result(HANG_S))}
    assert len(calls) == 1
    statistics = cache.statistics()
    assert statistics.shared + statistics.hits == 7


def test_a_failure_stays_with_its_owner_and_is_not_kept() -> None:
    cache = ProcessorCache(KIB * KIB)
    started, release = threading.Event(), threading.Event()

    def fail() -> dict[str, Any]:
        started.set()
        assert release.wait(HANG_S)
        raise ValueError("only mine")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.get_or_compute, "a", fail)
        assert started.wait(HANG_S)
        waiting = pool.submit(cache.get_or_compute, "a", lambda: value_of(3))
        release.set()
        with pytest.raises(ValueError, match="only mine"):
            first.result(HANG_S)
        assert waiting.result(HANG_S)["pixel_values"].nbytes == 3
    assert cache.get_or_compute("a", unexpected)["pixel_values"].nbytes == 3


def test_least_recently_used_goes_first() -> None:
    cache = ProcessorCache(12 * KIB)
    for key in "abc":
        cache.get_or_compute(key, lambda: value_of(3 * KIB))
    cache.get_or_compute("a", unexpected)
    cache.get_or_compute("d", lambda: value_of(3 * KIB))
    for key in "acd":
        cache.get_or_compute(key, unexpected)
    assert cache.statistics().evictions == 1
    cache.get_or_compute("b", lambda: value_of(1))


def test_what_is_larger_than_the_store_passes_through() -> None:
    cache = ProcessorCache(KIB)
    cache.get_or_compute("small", lambda: value_of(1))
    assert cache.get_or_compute("large", lambda: value_of(KIB))["pixel_values"].nbytes == KIB
    cache.get_or_compute("small", unexpected)
    assert cache.statistics().num_items == 1


def test_a_capacity_of_zero_keeps_nothing() -> None:
    cache = ProcessorCache(0)
    for _ in range(2):
        cache.get_or_compute("a", lambda: value_of(1))
    statistics = cache.statistics()
    assert (statistics.misses, statistics.hits, statistics.num_items, statistics.num_bytes) == (2, 0, 0, 0)


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 6 * KIB)), max_size=60))
def test_bytes_stay_within_bounds_and_add_up(requests: list[tuple[str, int]]) -> None:
    cache = ProcessorCache(8 * KIB)
    for key, num_bytes in requests:
        cache.get_or_compute(key, functools.partial(value_of, num_bytes))
        statistics = cache.statistics()
        assert 0 <= statistics.num_bytes <= 8 * KIB
        assert (statistics.num_items == 0) == (statistics.num_bytes == 0)
    statistics = cache.statistics()
    assert statistics.hits + statistics.misses + statistics.shared == len(requests)


def test_many_threads_and_keys_end_consistent() -> None:
    cache = ProcessorCache(16 * KIB)
    rng = np.random.default_rng(0)
    keys = [str(k) for k in rng.integers(0, 12, size=400)]

    def fail() -> Any:
        raise KeyError("missing")

    def request(key: str) -> bool:
        if key == "7":
            with pytest.raises(KeyError):
                cache.get_or_compute(key, fail)
            return True
        return bool(cache.get_or_compute(key, lambda: {**value_of(2 * KIB), "key": key})["key"] == key)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(request, keys))
    assert cache.statistics().num_bytes <= 16 * KIB


def test_sizes_count_whole_storages_once() -> None:
    whole = torch.zeros(1000, dtype=torch.float32)
    assert nested_bytes({"a": whole[:10], "b": [whole[10:20], (whole,)]}) == 4000
    array = np.zeros(100, dtype=np.float64)
    assert nested_bytes({"a": array[::2], "b": {"c": array}, "n": 3, "t": torch.zeros(3, dtype=torch.int64)}) == 824
