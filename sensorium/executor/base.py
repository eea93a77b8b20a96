"""The interface between the engine core and its workers."""

from __future__ import annotations

from typing import Protocol

from sensorium.messages import LoadReport, ModelRunnerOutput, SchedulerOutput


class PendingStep(Protocol):
    """A step that was submitted."""

    def result(self) -> ModelRunnerOutput:
        """Wait for the step, and return its result. After an exception the worker can't continue."""


class Executor(Protocol):
    """Loads the model and runs steps, in the order in which they are submitted."""

    def load(self) -> LoadReport:
        """Load the model, determine its features, and allocate its caches."""

    def submit(self, step: SchedulerOutput) -> PendingStep:
        """Start a step. Results must be taken in the order of submission. An exception means that the worker can't
        continue."""

    def shutdown(self) -> None:
        """Free everything."""
