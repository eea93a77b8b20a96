"""Keeps an engine core running: starts one, and replaces it when it dies, as often as allowed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

from sensorium.config import ModelFeatures
from sensorium.engine.args import EngineArgs
from sensorium.engine.core_client import CoreClient
from sensorium.engine.core_messages import CoreOutputs
from sensorium.engine.core_process import CoreFactory
from sensorium.errors import EngineDeadError, EngineRestartingError, SensoriumError
from sensorium.ipc.codec import EncodedMessage
from sensorium.logger import DEFAULT_LOG, LogSettings, get_logger
from sensorium.messages import LoadReport

logger = get_logger(__name__)

_FIRST_DELAY_S = 1.0
_LONGEST_DELAY_S = 30.0
_STEADY_S = 600.0
"""A core that ran this long had no lasting fault: its death is the first in a row."""
_END_GRACE_S = 5.0
"""Time to end for a core that has announced its end, or whose messages can't be read."""


class CoreSupervisor:
    """The current engine core. Requests don't outlive their core; the front and its caches do.

    Args:
        args: settings, which each core resolves by itself.
        on_outputs: called on the event loop with the outputs of each step.
        on_death: called with each death of a core that was ready, before a new one is started.
        make: makes cores in a thread of this process; by default each gets a process of its own.
        max_restarts: how many consecutive deaths lead to a new core.
        delay_s: seconds before the second restart in a row; doubled with each one after it. The first is at once.
    """

    def __init__(
        self,
        args: EngineArgs,
        on_outputs: Callable[[CoreOutputs], None],
        on_death: Callable[[EngineDeadError], None],
        *,
        make: CoreFactory | None = None,
        log: LogSettings = DEFAULT_LOG,
        max_restarts: int = 0,
        delay_s: float = _FIRST_DELAY_S,
    ) -> None:
        self._args = args
        self._on_news = on_outputs
        self._on_death = on_death
        self._make = make
        self._log = log
        self._max_restarts = max_restarts
        self._delay_s = delay_s
        self._client = self._new_client()
        self._report: LoadReport | None = None
        self._failure: SensoriumError | None = None
        self._has_ended = False
        self._num_in_a_row = 0
        self._num_restarts = 0
        self._ready_time_s = 0.0
        self._load_s = 0.0
        self._restart_task: asyncio.Task[None] | None = None

    @property
    def failure(self) -> SensoriumError | None:
        """Why there is no core to use now; None if there is one."""
        return self._failure or self._client.failure

    @property
    def has_ended(self) -> bool:
        """Whether there will be no other core."""
        return self._has_ended

    @property
    def num_restarts(self) -> int:
        """Cores that replaced a dead one."""
        return self._num_restarts

    @property
    def pid(self) -> int:
        """Id of the process that the core runs in."""
        return self._client.pid

    async def ready(self) -> LoadReport:
        """Wait until the first core has loaded the model.

        Raises:
            ConfigError, ModelError, WeightsError: It can't be served.
            EngineDeadError: The core ended.
        """
        start_s = time.monotonic()
        self._report = await self._client.ready()
        self._ready_time_s = time.monotonic()
        self._load_s = self._ready_time_s - start_s
        # Later cores get the same memory for their cache, so that admitted requests stay admissible.
        self._args = replace(
            self._args, num_blocks=self._report.num_blocks, kv_cache_bytes=None, block_size=self._report.block_size
        )
        return self._report

    def add(self, request: EncodedMessage) -> None:
        """Send an encoded `Add`."""
        self._client.add(request)

    def abort(self, request_ids: list[str]) -> None:
        """End requests in the core. A core that doesn't know them ignores it."""
        self._client.abort(request_ids)

    async def stop(self, timeout_s: float = 30.0) -> None:
        """Let the core free everything and end; kill it if it takes longer than that."""
        if self._restart_task is not None and not self._restart_task.done():
            self._restart_task.cancel()
            await asyncio.wait([self._restart_task])
        await self._client.stop(timeout_s)

    def _new_client(self) -> CoreClient:
        return CoreClient(self._args, self._on_news, self._died, make=self._make, log=self._log)

    def _died(self, error: EngineDeadError) -> None:
        if time.monotonic() - self._ready_time_s > _STEADY_S:
            self._num_in_a_row = 0
        if self._num_in_a_row < self._max_restarts:
            self._failure = error = EngineRestartingError(
                "the engine has ended, and is being started anew. Send the request again later.",
                retry_after_s=self._delay() + self._load_s,
            )
            self._restart_task = asyncio.get_running_loop().create_task(self._restart())
        else:
            self._has_ended = True
        self._on_death(error)

    def _delay(self) -> float:
        """Seconds before the next restart."""
        if self._num_in_a_row == 0:
            return 0.0
        return min(self._delay_s * 2.0 ** (self._num_in_a_row - 1), _LONGEST_DELAY_S)

    async def _restart(self) -> None:
        while self._num_in_a_row < self._max_restarts:
            await asyncio.sleep(self._delay())
            self._num_in_a_row += 1
            logger.warning("starting a new engine core, %d of at most %d", self._num_in_a_row, self._max_restarts)
            await self._client.stop(_END_GRACE_S)
            self._client = self._new_client()
            try:
                report = await self._client.ready()
            except SensoriumError as error:
                logger.error("the new engine core could not start: %s", error)
                continue
            self._take(report)
            return
        self._end(f"the engine has ended, and {self._max_restarts} new ones in a row could not start. Restart it.")

    def _take(self, report: LoadReport) -> None:
        if self._client.failure is not None:
            return  # it died before it was installed; the next restart handles that
        assert self._report is not None
        if _traits(report) != _traits(self._report):
            self._end("the engine has ended, and the model is not the same any more. Restart it.")
            return
        self._num_restarts += 1
        self._ready_time_s = time.monotonic()
        self._failure = None
        logger.warning("the new engine core is ready")

    def _end(self, message: str) -> None:
        logger.error("%s", message)
        self._failure = EngineDeadError(message)
        self._has_ended = True


def _traits(report: LoadReport) -> tuple[ModelFeatures, int, int]:
    """The properties that the front relies on."""
    return replace(report.features, notes=()), report.num_blocks, report.block_size
