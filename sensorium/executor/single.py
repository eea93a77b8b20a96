"""One worker in this process."""

from __future__ import annotations

from concurrent.futures import Future

from sensorium.config import EngineConfig
from sensorium.executor.base import PendingStep
from sensorium.messages import LoadReport, SchedulerOutput, Vocabulary
from sensorium.structured_outputs import StructuredOutputs
from sensorium.worker.worker import Worker


class SingleProcessExecutor:
    """Calls the worker directly."""

    def __init__(self, config: EngineConfig) -> None:
        self._worker = Worker(config)

    @property
    def worker(self) -> Worker:
        """The worker, for tests and tools that look at the model."""
        return self._worker

    def load(self) -> LoadReport:
        """See `Executor.load`."""
        return self._worker.load()

    def submit(self, step: SchedulerOutput) -> PendingStep:
        """See `Executor.submit`."""
        return self._worker.submit(step)

    def use_idle_time(self) -> bool:
        """See `Executor.use_idle_time`."""
        return self._worker.use_idle_time()

    def use_vocabulary(self, vocabulary: Vocabulary) -> None:
        """See `Executor.use_vocabulary`."""
        self._worker.runner.form_compiler.use_vocabulary(vocabulary)

    def compile_form(self, form: StructuredOutputs) -> Future[None]:
        """See `Executor.compile_form`."""
        return self._worker.runner.form_compiler.compile(form)

    def shutdown(self) -> None:
        """See `Executor.shutdown`."""
        self._worker.shutdown()
