"""What the engine core asks of its workers."""

from __future__ import annotations

from typing import Protocol

from sensorium.messages import LoadReport, ModelRunnerOutput, SchedulerOutput


class PendingStep(Protocol):
    """A step that was submitted."""

    def result(self) -> ModelRunnerOutput:
        """What the step brought; waits for it. An exception means that the worker can't go on."""


class Executor(Protocol):
    """Loads the model and runs steps, in the order in which they are submitted."""

    def load(self) -> LoadReport:
        """Load the model, find out its features, allocate its caches."""

    def submit(self, step: SchedulerOutput) -> PendingStep:
        """Begin a step. Results are asked for in the same order. An exception means that the worker can't go on."""

    def shutdown(self) -> None:
        """Free everything."""
