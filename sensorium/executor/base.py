"""What the engine core asks of its workers."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Protocol

from sensorium.messages import LoadReport, ModelRunnerOutput, SchedulerOutput, Vocabulary
from sensorium.structured_outputs import StructuredOutputs


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

    def use_idle_time(self) -> bool:
        """Get ready for later steps, for a fraction of a second, while there is none; False: nothing is left to do."""

    def use_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Say what tokens outputs consist of; before the first `compile_form`."""

    def compile_form(self, form: StructuredOutputs) -> Future[None]:
        """Get ready for outputs of this form, without making anyone wait; the future raises what is wrong with it."""

    def shutdown(self) -> None:
        """Free everything."""
