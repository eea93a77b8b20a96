"""A rank other than the first: loads its share of the model, and runs the steps that the executor sends."""

from __future__ import annotations

import os
import socket
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

import msgspec
import torch

from sensorium.config import EngineConfig
from sensorium.distributed.groups import join
from sensorium.errors import EngineDeadError, LostRankError, SensoriumError
from sensorium.executor.base import PendingStep
from sensorium.executor.rank_messages import Joining, RankFailed, RankReady, RunStep, StartRank, StopRank, to_rank
from sensorium.ipc.channel import BlockingChannel
from sensorium.ipc.codec import EncodedMessage, decode_step, encode
from sensorium.logger import get_logger
from sensorium.messages import SchedulerOutput
from sensorium.worker.worker import Worker

logger = get_logger(__name__)


class RankServer:
    """Runs a rank, from its first message to its end, in `serve`.

    Args:
        sock: The rank's end of the pair of sockets.
        resolve: Makes the configuration that the first rank has from the settings in `StartRank`.
        on_orphaned: Called in another thread as soon as the executor has ended.
    """

    def __init__(
        self, sock: socket.socket, resolve: Callable[[msgspec.Raw], EngineConfig], on_orphaned: Callable[[], None]
    ) -> None:
        self._channel = BlockingChannel(sock)
        self._resolve = resolve
        self._on_orphaned = on_orphaned
        self._meeting_fd = -1
        self._orders: SimpleQueue[StartRank | SchedulerOutput | None] = SimpleQueue()
        """None means stop."""

    def serve(self) -> bool:
        """Load, run steps until told to stop, and free everything. Returns whether there was no error."""
        threading.Thread(target=self._receive, name="sensorium-rank-receiver", daemon=True).start()
        start = self._orders.get()
        if start is None:
            return True
        assert isinstance(start, StartRank)
        try:
            self._run(start)
            return True
        except LostRankError:
            logger.info("rank %d ends with another one", start.rank)
        except SensoriumError as error:
            self._tell(RankFailed(type(error).__name__, str(error)))
        except Exception as error:
            logger.exception("rank %d failed", start.rank)
            self._tell(RankFailed(EngineDeadError.__name__, f"rank {start.rank}: {type(error).__name__}: {error}"))
        finally:
            self._channel.close()
        return False

    def _run(self, start: StartRank) -> None:
        config = self._resolve(start.settings)
        self._tell(Joining())
        device = torch.device(config.device_config.of_rank(start.rank))
        group = join(device, self._meeting_fd, start.rank, start.size)
        os.close(self._meeting_fd)
        worker = Worker(config.as_rank_of(group))
        try:
            report = worker.load()
            self._tell(RankReady(report.features, report.num_blocks))
            self._run_steps(worker, config.scheduler_config.max_steps_in_flight)
        finally:
            worker.shutdown()
            group.close()

    def _run_steps(self, worker: Worker, max_in_flight: int) -> None:
        """Run steps, with as many in flight as the first rank has."""
        in_flight: deque[PendingStep] = deque()
        while (step := self._orders.get()) is not None:
            assert isinstance(step, SchedulerOutput)
            in_flight.append(worker.submit(step))
            while len(in_flight) >= max_in_flight:
                in_flight.popleft().result()

    def _receive(self) -> None:
        """Run the receiving thread, which decodes messages so that the main thread only computes."""
        try:
            for frame in self._channel.receive():
                order = self._order_of(frame)
                self._orders.put(order)
                if order is None:
                    return
        except Exception:
            logger.exception("a message from the executor can't be read")
        self._orders.put(None)
        self._on_orphaned()

    def _order_of(self, frame: EncodedMessage) -> StartRank | SchedulerOutput | None:
        message = to_rank.decode(frame.payload)
        if isinstance(message, StopRank):
            return None
        fd, frame.fd = frame.fd, None
        if isinstance(message, RunStep):
            return decode_step(message.step, fd)
        assert fd is not None
        self._meeting_fd = fd
        return message

    def _tell(self, message: msgspec.Struct) -> None:
        try:
            self._channel.send(encode(message))
        except OSError:
            logger.info("the executor is gone")
