"""Where workers run. One process today; the protocol is what several processes will implement."""

from sensorium.executor.base import Executor, PendingStep
from sensorium.executor.single import SingleProcessExecutor

__all__ = ["Executor", "PendingStep", "SingleProcessExecutor"]
