"""One worker in this process."""

from __future__ import annotations

from sensorium.config import EngineConfig
from sensorium.executor.base import PendingStep
from sensorium.messages import LoadReport, SchedulerOutput
from sensorium.worker.worker import Worker


class SingleProcessExecutor:
    """Calls its worker directly."""

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

    def shutdown(self) -> None:
        """See `Executor.shutdown`."""
        self._worker.shutdown()
