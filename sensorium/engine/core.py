"""The core loop: schedule, execute, update. Knows requests as ids and tokens; text is the front's business."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from sensorium.config import EngineConfig, ModelFeatures
from sensorium.errors import EngineDeadError
from sensorium.executor import Executor, SingleProcessExecutor
from sensorium.logger import get_logger
from sensorium.messages import EngineOutput, EngineRequest, LoadReport
from sensorium.scheduler import Scheduler, SchedulerStats

logger = get_logger(__name__)


class EngineCore:
    """Owns the scheduler and the executor. Used by one thread.

    Every added request ends in exactly one `EngineOutput` with a `finish_reason`.
    """

    def __init__(self, config: EngineConfig, executor: Executor | None = None) -> None:
        self._executor = executor or SingleProcessExecutor(config)
        self.report: LoadReport = self._executor.load()
        for line in self.report.lines():
            logger.info(line)
        self.config = within_blocks(config, self.report)
        """The configuration with the context length that the KV cache can hold."""
        self.scheduler = Scheduler(
            config.scheduler_config,
            config.cache_config,
            self.report.features,
            num_blocks=self.report.num_blocks,
            max_model_len=self.config.model_config.max_model_len,
        )
        self._failure: BaseException | None = None

    @property
    def features(self) -> ModelFeatures:
        """What loading found out about the model."""
        return self.report.features

    @property
    def executor(self) -> Executor:
        """What runs the steps."""
        return self._executor

    def add_request(self, request: EngineRequest) -> None:
        """Put a request in line.

        Raises:
            InvalidRequestError: It needs more KV blocks than there are.
            OverloadedError: The line is full.
            EngineDeadError: An earlier step ended the engine.
        """
        self._check_alive()
        self.scheduler.add_request(request)

    def abort(self, request_ids: Iterable[str]) -> list[EngineOutput]:
        """End requests; ids that are unknown or finished are ignored."""
        outputs = self.scheduler.abort(request_ids)
        self._release_if_idle()
        return outputs

    def has_unfinished_requests(self) -> bool:
        """Whether a step would have something to do."""
        return self.scheduler.has_unfinished_requests()

    def step(self) -> list[EngineOutput]:
        """Run one step.

        Raises:
            EngineDeadError: The worker can't go on.
        """
        self._check_alive()
        outputs = self._step()
        self._release_if_idle()
        return outputs

    def _step(self) -> list[EngineOutput]:
        step = self.scheduler.schedule()
        try:
            result = self._executor.execute(step)
        except Exception as error:
            self._failure = error
            logger.exception("the worker can't go on")
            raise EngineDeadError(f"the engine has ended: {type(error).__name__}. Restart it.") from error
        return self.scheduler.update(step, result)

    def _release_if_idle(self) -> None:
        """Let the worker free what the last requests held; with requests left, the next step tells it."""
        if self._failure is None and not self.scheduler.has_unfinished_requests() and self.scheduler.has_releases:
            self._step()

    def stats(self) -> SchedulerStats:
        """Counters and gauges of the scheduler and its caches."""
        return self.scheduler.stats()

    def shutdown(self) -> None:
        """Free the worker's memory."""
        self._executor.shutdown()

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineDeadError(f"the engine has ended: {type(self._failure).__name__}. Restart it.")


def within_blocks(config: EngineConfig, report: LoadReport) -> EngineConfig:
    """`config` with a context no longer than what all KV blocks together hold."""
    held = report.num_blocks * report.block_size
    if config.model_config.max_model_len <= held:
        return config
    logger.warning(
        "max_model_len: got %d, but the KV cache holds %d tokens, so requests may have at most %d. "
        "Raise kv_cache_bytes or memory_fraction for longer ones.",
        *(config.model_config.max_model_len, held, held),
    )
    return replace(config, model_config=replace(config.model_config, max_model_len=held))
