"""How long the parts of a step took, on the host's clock or on the device's."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import torch

from sensorium.model_executor.host_copy import new_event


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of one step."""

    encode_s: float
    forward_s: float
    """From the end of encoding to the sampled tokens."""
    idle_s: float
    """Between the step before and this one, while the device had nothing to do."""


class StepTimer(Protocol):
    """Times one step: `begin` when its work is first submitted, `encoded`, `end`, then `times`."""

    def begin(self) -> None:
        """The step's first work is submitted after this."""

    def encoded(self) -> None:
        """All encoding was submitted."""

    def end(self) -> None:
        """All the step's work was submitted."""

    def times(self) -> StepTimes:
        """What was measured. Waits for the device; asked once, in the order of the steps."""


class HostTimer:
    """For a device that has done its work when a call returns."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    def begin(self) -> None:
        """See `StepTimer.begin`."""
        self._mark()

    def encoded(self) -> None:
        """See `StepTimer.encoded`."""
        self._mark()

    def end(self) -> None:
        """See `StepTimer.end`."""
        self._mark()

    def times(self) -> StepTimes:
        """See `StepTimer.times`. Nobody is kept idle: the host is the device."""
        begin, encoded, end = self._marks
        return StepTimes(encoded - begin, end - encoded, 0.0)

    def _mark(self) -> None:
        self._marks.append(time.perf_counter())


class CudaTimer:
    """By events on the current stream. `before` is the end of the step before, if there was one."""

    def __init__(self, before: torch.cuda.Event | None) -> None:
        self._before = before
        self._begin, self._encoded, self.last = (new_event(enable_timing=True) for _ in range(3))

    def begin(self) -> None:
        """See `StepTimer.begin`."""
        self._begin.record()

    def encoded(self) -> None:
        """See `StepTimer.encoded`."""
        self._encoded.record()

    def end(self) -> None:
        """See `StepTimer.end`."""
        self.last.record()

    def times(self) -> StepTimes:
        """See `StepTimer.times`."""
        self.last.synchronize()
        idle_ms = 0.0 if self._before is None else self._before.elapsed_time(self._begin)
        return StepTimes(
            self._begin.elapsed_time(self._encoded) / 1e3,
            self._encoded.elapsed_time(self.last) / 1e3,
            max(idle_ms, 0.0) / 1e3,
        )


class StepClock:
    """Makes the timers of a device's steps, one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._last: torch.cuda.Event | None = None

    def new_step(self) -> StepTimer:
        """The timer of the next step."""
        if not self._is_cuda:
            return HostTimer()
        timer = CudaTimer(self._last)
        self._last = timer.last
        return timer

    def rest(self) -> None:
        """The device has nothing to do because nobody asks for anything: the time until the next step is no gap."""
        self._last = None
