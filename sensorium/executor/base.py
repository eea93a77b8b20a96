"""What the engine core asks of its workers."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Protocol

from sensorium.messages import LoadReport, ModelRunnerOutput, SchedulerOutput, Vocabulary
from sensorium.structured_outputs import StructuredOutputs


class Executor(Protocol):
    """Loads the model and runs steps."""

    def load(self) -> LoadReport:
        """Load the model, find out its features, allocate its caches."""

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """Run one step. An exception means that the worker can't go on."""

    def use_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Say what tokens outputs consist of; before the first `compile_form`."""

    def compile_form(self, form: StructuredOutputs) -> Future[None]:
        """Get ready for outputs of this form, without making anyone wait; the future raises what is wrong with it."""

    def shutdown(self) -> None:
        """Free everything."""
