"""What the engine core asks of its workers."""

from __future__ import annotations

from typing import Protocol

from sensorium.messages import LoadReport, ModelRunnerOutput, SchedulerOutput


class Executor(Protocol):
    """Loads the model and runs steps."""

    def load(self) -> LoadReport:
        """Load the model, find out its features, allocate its caches."""

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """Run one step. An exception means that the worker can't go on."""

    def shutdown(self) -> None:
        """Free everything."""
