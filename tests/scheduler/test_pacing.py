"""Steps sized by measured costs."""

from __future__ import annotations

import pytest

from sensorium.scheduler.pacing import (
    MIN_PREFILL_TOKENS,
    SAFETY,
    UNBOUNDED,
    UNMEASURED_TOKENS,
    Pacer,
    RunningRate,
    StepPace,
)


def test_without_streams_there_is_no_bound() -> None:
    pace = Pacer(0.1, decode_s=0.05, token_s=1.0, row_s=1.0).begin_step(has_streams=False)
    pace.add(10_000, 10_000)
    assert pace.token_room() == UNBOUNDED
    assert pace.admits_rows(10_000, 10_000)


def test_a_step_has_the_tokens_that_fit_the_gap() -> None:
    pace = Pacer(1.0, decode_s=0.1, token_s=0.001, row_s=0.002).begin_step(has_streams=True)
    assert pace.token_room() == pytest.approx(800, abs=1)
    assert pace.token_room(extra_rows=100) == pytest.approx(600, abs=1)
    pace.add(500, 0)
    assert pace.token_room() == pytest.approx(300, abs=1)
    assert pace.admits_rows(100, 99)
    assert not pace.admits_rows(100, 101)
    pace.add(0, 100)
    assert pace.token_room() == pytest.approx(100, abs=1)


def test_the_first_prefill_of_a_step_has_its_minimum_however_slow_the_machine() -> None:
    pace = Pacer(0.1, decode_s=5.0, token_s=1.0).begin_step(has_streams=True)
    assert pace.token_room() == MIN_PREFILL_TOKENS
    pace.add(1, 0)
    assert pace.token_room() == 0


def test_before_anything_is_measured_steps_are_careful() -> None:
    pace = Pacer(0.1).begin_step(has_streams=True)
    assert pace.token_room() == UNMEASURED_TOKENS
    assert not pace.admits_rows(1, 0), "beside the step's first item, which asks nobody"


def test_rates_are_learnt_from_steps_of_any_mixture() -> None:
    pacer = Pacer(0.25)
    decode_s, token_s, row_s = 0.03, 0.0008, 0.002
    for num_tokens, num_rows in [(400, 144), (0, 0), (100, 0), (0, 0), (300, 144), (0, 0), (64, 20)] * 5:
        pacer.observe(num_tokens, num_rows, row_s * num_rows, decode_s + token_s * num_tokens)
    assert pacer.decode_s.value == pytest.approx(decode_s)
    assert pacer.token_s.value == pytest.approx(token_s, rel=0.05)
    assert pacer.row_s.value == pytest.approx(row_s)


def test_paced_steps_settle_at_the_bound_though_no_step_shows_a_decode_alone() -> None:
    """Every step has prefill, so what a decode costs is never seen by itself. The whole still comes out right."""
    pacer, decode_s, token_s = Pacer(0.25), 0.05, 0.001
    seconds = 0.0
    for _ in range(40):
        room = pacer.begin_step(has_streams=True).token_room()
        seconds = decode_s + token_s * room
        pacer.observe(room, 0, 0.0, seconds)
    assert seconds == pytest.approx(SAFETY * 0.25, rel=0.05)


def test_one_slow_step_moves_the_rate_little_and_is_soon_forgotten() -> None:
    rate = RunningRate(1.0)
    rate.observe(1000.0)
    assert rate.value == pytest.approx(1.5)
    for _ in range(10):
        rate.observe(1.0)
    assert rate.value == pytest.approx(1.0, rel=0.05)
    rate.observe(-5.0)
    assert rate.value is not None
    assert rate.value > 0.8


def test_a_slow_first_sample_is_forgotten_too() -> None:
    rate = RunningRate()
    rate.observe(0.0)
    assert rate.value is None
    rate.observe(50.0)
    for _ in range(40):
        rate.observe(1.0)
    assert rate.value == pytest.approx(1.0, rel=0.05)


def test_few_tokens_say_nothing_of_the_cost_of_a_token() -> None:
    pacer = Pacer(0.25, decode_s=0.03, token_s=0.001)
    pacer.observe(3, 0, 0.0, 0.5)
    assert pacer.token_s.value == 0.001


def test_a_pace_counts_what_it_is_told() -> None:
    pace = StepPace(1.0, 0.01, 0.01)
    pace.add(5, 7)
    pace.add(1, 0)
    assert (pace.num_tokens, pace.num_rows) == (6, 7)
