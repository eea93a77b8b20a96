"""Where workers run, and how the engine core calls them: in its own process, or in several ranks that share a model."""

from sensorium.executor.base import Executor, PendingStep
from sensorium.executor.multi import MultiProcessExecutor
from sensorium.executor.single import SingleProcessExecutor

__all__ = ["Executor", "MultiProcessExecutor", "PendingStep", "SingleProcessExecutor"]
