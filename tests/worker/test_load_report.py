"""The load report says what computes, where it isn't what this kind of device usually has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sensorium import EngineArgs, LLMEngine
from sensorium.kernels import native
from tests.helpers.checkpoints import make_checkpoint


@pytest.fixture
def by_plain_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SENSORIUM_NATIVE", "0")
    native._load.cache_clear()
    yield
    monkeypatch.undo()
    native._load.cache_clear()


def report_lines() -> list[str]:
    args = EngineArgs(str(make_checkpoint("qwen2")), device="cpu", num_blocks=16)
    return [line for line in LLMEngine.from_engine_args(args).report.lines() if line.startswith("kernels")]


def test_plain_torch_is_reported_with_what_follows(by_plain_torch: None) -> None:
    """Log probabilities of a second answer once had other last digits, and nothing had said that they might."""
    [line] = report_lines()
    assert "plain torch (SENSORIUM_NATIVE=0)" in line
    assert "log probabilities may differ a little" in line


def test_native_kernels_are_the_usual_case() -> None:
    if native.native_refusal() is None:
        assert report_lines() == []
    else:
        assert len(report_lines()) == 1
