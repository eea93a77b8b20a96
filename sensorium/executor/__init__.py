"""Where workers run, and how the engine core reaches them: in its process, or in several that share a model."""

from sensorium.executor.base import Executor, PendingStep
from sensorium.executor.multi import MultiProcessExecutor
from sensorium.executor.single import SingleProcessExecutor

__all__ = ["Executor", "MultiProcessExecutor", "PendingStep", "SingleProcessExecutor"]
