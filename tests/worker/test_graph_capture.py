"""What a recorded pass can't follow keeps it from being recorded, and nothing else."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sensorium.worker.graph_capture import UNREADABLE, RecordedSizes

READS: list[Callable[[Any], object]] = [
    len,
    list,
    max,
    bool,
    int,
    lambda x: x[0],
    lambda x: 3 in x,
    lambda x: x == 0,
    lambda x: x > 0,
    lambda x: x + 1,
    lambda x: 1 - x,
    lambda x: [1, 2][:x],
    operator.index,
    np.asarray,
]


@pytest.mark.parametrize("read", READS, ids=range(len(READS)))
def test_lengths_on_the_host_are_unreadable_while_a_pass_is_recorded(read: Callable[[Any], object]) -> None:
    """A model that read them would be right for the step that was recorded and wrong, silently, for all others."""
    with pytest.raises(RuntimeError, match="a recorded pass can't follow"):
        read(UNREADABLE)


def test_a_size_is_recorded_once_and_used_for_fewer_rows() -> None:
    made: list[int] = []

    def record(size: int) -> str:
        made.append(size)
        return f"graph of {size}"

    sizes = RecordedSizes("passes", [1, 4, 8], record)
    assert [sizes.graph_for(n) for n in (3, 4, 2, 8, 9)] == ["graph of 4"] * 3 + ["graph of 8", None]
    assert made == [4, 8]
    assert sizes.record_next()
    assert not sizes.record_next()
    assert made == [4, 8, 1]


def test_one_failure_ends_recording_and_passes_run_call_by_call() -> None:
    def record(size: int) -> str:
        if size == 4:
            raise RuntimeError("it asks the host")
        return "graph"

    sizes = RecordedSizes("passes", [1, 4, 8], record)
    assert sizes.graph_for(1) == "graph"
    assert sizes.graph_for(3) is None
    assert sizes.refusal == "RuntimeError: it asks the host"
    assert sizes.graph_for(1) is None
    assert not sizes.record_next()
