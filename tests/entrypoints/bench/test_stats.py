"""Figures from samples, on examples small enough to check by hand."""

from __future__ import annotations

from array import array

import numpy as np
import pytest

from sensorium.entrypoints.bench.events import Sample
from sensorium.entrypoints.bench.load import Arrivals, LoadResult
from sensorium.entrypoints.bench.spans import Size, Span, Target
from sensorium.entrypoints.bench.stats import client_cost, meets, percentile, spread_ms, summary
from sensorium.errors import ConfigError


def sample(start_s: float, tokens_s: list[float], end_s: float, num_output: int, error: str | None = None) -> Sample:
    return Sample(start_s, start_s, end_s, array("d", tokens_s), 10, num_output, error)


SLOW = sample(0.0, [1.0, 1.5, 3.0], 3.5, 5)
"""First token after 1 s; 2 s for the 4 tokens after it; gaps 0.5 and 1.5 s; over after 3.5 s."""
FAST = sample(1.0, [1.25], 1.25, 1)
FAILED = sample(0.0, [0.5], 4.0, 1, "status 500: no")


def test_percentiles_are_those_of_numpy() -> None:
    assert percentile([1, 2, 3, 4], 90) == pytest.approx(3.7)
    values = sorted(np.random.default_rng(0).exponential(size=101).tolist())
    for percent in (0, 1, 50, 90, 99, 100):
        assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)))
    assert percentile([5.0], 99) == 5.0


def test_a_spread() -> None:
    assert spread_ms([0.003, 0.001, 0.002]) == {"mean": 2.0, "p50": 2.0, "p90": 2.8, "p99": 2.98, "max": 3.0}
    assert spread_ms([]) is None


def test_all_figures_of_a_run() -> None:
    result = LoadResult([SLOW, FAST, FAILED], wall_s=4.0, cpu_s=0.02, max_lag_s=0.001)
    figures = summary(result, [Target("ttft", 1000), Target("itl", 1000)])
    assert (figures["completed"], figures["failed"], figures["errors"]) == (2, 1, {"status 500: no": 1})
    assert (figures["prompt_tokens"], figures["output_tokens"], figures["token_events"]) == (20, 6, 4)
    assert (figures["requests_per_s"], figures["output_tokens_per_s"], figures["total_tokens_per_s"]) == (0.5, 1.5, 6.5)
    assert figures["ttft_ms"]["mean"] == 625.0
    assert figures["tpot_ms"] == dict.fromkeys(("mean", "p50", "p90", "p99", "max"), 500.0)
    assert figures["itl_ms"]["p50"] == 1000.0
    assert figures["e2e_ms"]["max"] == 3500.0
    assert figures["goodput"] == {"targets": ["ttft:1000", "itl:1000"], "requests_per_s": 0.25, "share": 0.3333}
    assert client_cost(result) == {"cpu_us_per_token_event": 4000.0, "cpu_share": 0.005, "max_lag_ms": 1.0}


def test_nothing_succeeded() -> None:
    figures = summary(LoadResult([FAILED], 4.0, 0.0, 0.0), [Target("e2e", 1)])
    assert (figures["completed"], figures["ttft_ms"], figures["goodput"]["share"]) == (0, None, 0.0)


@pytest.mark.parametrize(
    ("target", "expected"), [("ttft:1000", True), ("ttft:999", False), ("tpot:499", False), ("itl:1500", True)]
)
def test_targets(target: str, expected: bool) -> None:
    assert meets(SLOW, [Target.parse(target)]) == expected
    assert meets(FAST, [Target.parse("tpot:0"), Target.parse("itl:0")])


def test_arrival_times() -> None:
    assert Arrivals().times_s(3, seed=0) == [0.0, 0.0, 0.0]
    even = Arrivals(rate=2.0, burstiness=0).times_s(4, seed=0)
    assert even == pytest.approx([0.0, 0.5, 1.0, 1.5])
    for burstiness in (0.25, 1.0, 4.0):
        times = Arrivals(rate=10.0, burstiness=burstiness).times_s(20_001, seed=1)
        gaps = np.diff(times)
        assert gaps.min() >= 0
        assert gaps.mean() == pytest.approx(0.1, rel=0.06)
        assert gaps.var() / gaps.mean() ** 2 == pytest.approx(burstiness, rel=0.15)
    assert Arrivals(rate=10.0).times_s(5, seed=1) == Arrivals(rate=10.0).times_s(5, seed=1)
    assert (Arrivals().max_streams, Arrivals(rate=1.0).max_streams, Arrivals(streams=3).max_streams) == (16, None, 3)


def test_small_values() -> None:
    assert (Span.parse("7"), Span.parse("3-9"), str(Span(3, 9)), str(Span(7, 7))) == (
        Span(7, 7),
        Span(3, 9),
        "3-9",
        "7",
    )
    assert (Size.parse("640x480"), Size.parse("8x9:2.5")) == (Size(640, 480), Size(8, 9, 2.5))
    assert (str(Size(8, 9, 2.5)), str(Size(8, 9))) == ("8x9:2.5", "8x9")
    drawn = {Span(1, 3).draw(np.random.default_rng(seed)) for seed in range(50)}
    assert drawn == {1, 2, 3}


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Span, "9-3"),
        (Span, "x"),
        (Span, "-1"),
        (Size, "0x4"),
        (Size, "4x4:0"),
        (Size, "4"),
        (Target, "ttft"),
        (Target, "a:1"),
    ],
)
def test_small_values_that_are_wrong(kind: type[Span | Size | Target], text: str) -> None:
    with pytest.raises(ConfigError, match="got"):
        kind.parse(text)


@pytest.mark.parametrize("wrong", [{"streams": 0}, {"rate": 0.0}, {"rate": float("inf")}, {"burstiness": -1.0}])
def test_arrivals_that_are_wrong(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="got"):
        Arrivals(**wrong)  # type: ignore[arg-type]
