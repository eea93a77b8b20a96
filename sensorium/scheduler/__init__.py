"""The scheduler: decides what each step computes, and which KV blocks and encoder rows are kept. Free of torch."""

from sensorium.scheduler.scheduler import Scheduler
from sensorium.scheduler.stats import SchedulerStats

__all__ = ["Scheduler", "SchedulerStats"]
