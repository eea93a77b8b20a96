"""Several workers that share one model: the first in this process, and each of the others in its own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TypeVar

import msgspec
import torch

from sensorium.anonymous_file import anonymous_file
from sensorium.config import EngineConfig
from sensorium.distributed.groups import join
from sensorium.distributed.process_group import ProcessGroup
from sensorium.errors import EngineDeadError, LostRankError, SensoriumError, error_named
from sensorium.executor.base import PendingStep
from sensorium.executor.rank_messages import (
    FromRank,
    Joining,
    RankFailed,
    RankReady,
    RunStep,
    StartRank,
    StopRank,
    from_rank,
)
from sensorium.ipc.channel import BlockingChannel, channel_pair
from sensorium.ipc.codec import EncodedMessage, encode, encode_step
from sensorium.logger import get_logger
from sensorium.messages import LoadReport, ModelRunnerOutput, SchedulerOutput
from sensorium.worker.worker import Worker

logger = get_logger(__name__)

T = TypeVar("T", bound=msgspec.Struct)

_EXIT_GRACE_S = 5.0
_LAST_WORD_S = 5.0
"""How long a rank that failed may take to say why."""


class MultiProcessExecutor:
    """Sends each step to the other ranks as a message without pickle, and runs it on the first, whose results count.

    If a rank ends, all ranks end: whatever waits for it raises `LostRankError`.

    Args:
        config: The engine's configuration. `tensor_parallel_size` is the number of ranks.
        module: The module that runs as a rank's process. Its argument is the file descriptor of its socket.
        settings: Encoded settings, from which that module makes the same configuration.
    """

    def __init__(self, config: EngineConfig, module: str, settings: bytes) -> None:
        self._config = config
        self._size = config.parallel_config.tensor_parallel_size
        self._module = module
        self._settings = msgspec.Raw(settings)
        self._ranks: list[_Rank] = []
        self._group: ProcessGroup | None = None
        self._worker: Worker | None = None
        self._is_stopping = False

    @property
    def worker(self) -> Worker:
        """The first rank's worker, for tests and tools that look at the model."""
        assert self._worker is not None, "load() was not called"
        return self._worker

    @property
    def pids(self) -> list[int]:
        """Ids of the other ranks' processes."""
        return [rank.pid for rank in self._ranks]

    def load(self) -> LoadReport:
        """See `Executor.load`.

        Raises:
            ConfigError, ModelError, WeightsError: A rank can't load its share.
            LostRankError: A rank ended without saying why.
        """
        with self._ended_together():
            self._group = self._met()
            if any(rank.has_ended for rank in self._ranks):
                self._on_end()  # again, because it may have ended before the group existed
            self._worker = Worker(self._config.as_rank_of(self._group))
            report = self._worker.load()
            for each in self._ranks:
                ready = each.expect(RankReady)
                if (ready.features, ready.num_blocks) != (report.features, report.num_blocks):
                    raise EngineDeadError(
                        f"rank {each.rank}: got other features of the model than the first rank found, expected the "
                        "same. Restart the engine."
                    )
            return report

    def submit(self, step: SchedulerOutput) -> PendingStep:
        """See `Executor.submit`."""
        message = encode_step(step)
        for rank in self._ranks:
            rank.run(message)
        message.close()
        assert self._group is not None, "load() was not called"
        return _SharedStep(self.worker.submit(step), self._group)

    def shutdown(self) -> None:
        """See `Executor.shutdown`."""
        self._is_stopping = True
        for rank in self._ranks:
            rank.stop()
        if self._worker is not None:
            self._worker.shutdown()
        if self._group is not None:
            self._group.close()
        for rank in self._ranks:
            rank.wait()
        self._ranks = []

    def _met(self) -> ProcessGroup:
        """Start the other ranks, and form a group with them."""
        meeting_fd = anonymous_file()
        try:
            for rank in range(1, self._size):
                start = StartRank(self._settings, rank, self._size)
                self._ranks.append(_Rank(self._module, start, meeting_fd, self._on_end))
            for each in self._ranks:
                each.expect(Joining)
            device = torch.device(self._config.device_config.of_rank(0))
            return join(device, meeting_fd, 0, self._size)
        finally:
            os.close(meeting_fd)

    def _on_end(self) -> None:
        """Called when a rank has ended, in another thread, since this one may be waiting for that rank."""
        if self._group is not None and not self._is_stopping:
            self._group.lose()

    @contextmanager
    def _ended_together(self) -> Iterator[None]:
        """An error within this context ends all ranks. If another rank caused it and has said why, that is raised."""
        try:
            yield
        except BaseException as error:
            is_lost = isinstance(error, LostRankError) or (self._group is not None and self._group.is_lost)
            causes = [cause for rank in self._ranks if (cause := rank.last_word()) is not None] if is_lost else []
            self.shutdown()
            if causes:
                raise causes[0] from error
            raise


@dataclass(frozen=True, slots=True)
class _SharedStep:
    """A step on the first rank. Its result is invalid if another rank ended meanwhile."""

    pending: PendingStep
    group: ProcessGroup

    def result(self) -> ModelRunnerOutput:
        """See `PendingStep.result`. Raises `LostRankError`."""
        output = self.pending.result()
        if self.group.is_lost:
            raise LostRankError("a step: a rank has ended, expected all of them. Restart the engine.")
        return output


class _Rank:
    """A rank's process. It inherits only its socket, and ends when that closes for any reason.

    When it has ended, `on_end` is called in another thread.
    """

    def __init__(self, module: str, start: StartRank, meeting_fd: int, on_end: Callable[[], None]) -> None:
        self.rank = start.rank
        own, other = channel_pair()
        self._channel = BlockingChannel(own)
        self._on_end = on_end
        self.has_ended = False
        self._messages: SimpleQueue[FromRank | None] = SimpleQueue()
        """None marks the end."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(other.fileno())],
                pass_fds=[other.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
            )
        threading.Thread(target=self._receive, name=f"sensorium-rank-{self.rank}", daemon=True).start()
        self._send(EncodedMessage(encode(start).payload, os.dup(meeting_fd)))

    @property
    def pid(self) -> int:
        return self._process.pid

    def expect(self, kind: type[T]) -> T:
        """The rank's next message. Raises the error that the rank reports, and `LostRankError` if it has ended."""
        message = self._messages.get()
        if isinstance(message, kind):
            return message
        raise self._lost() if message is None else _error_of(message)

    def run(self, step: EncodedMessage) -> None:
        """Send it an encoded step; the caller still has to close it. Raises `LostRankError` if the rank has ended."""
        payload = msgspec.msgpack.encode(RunStep(msgspec.Raw(step.payload)))
        self._send(EncodedMessage(payload, None if step.fd is None else os.dup(step.fd)))

    def last_word(self) -> SensoriumError | None:
        """The error that it reports within `_LAST_WORD_S`, or None."""
        try:
            while (message := self._messages.get(timeout=_LAST_WORD_S)) is not None:
                if isinstance(message, RankFailed):
                    return _error_of(message)
        except Empty:
            return None
        return None

    def stop(self) -> None:
        """Tell the rank to end."""
        try:
            self._send(encode(StopRank()))
        except LostRankError:
            logger.debug("rank %d has ended already", self.rank)
        self._channel.close()

    def wait(self) -> None:
        """Wait until the process has ended; kill it after `_EXIT_GRACE_S`."""
        try:
            self._process.wait(_EXIT_GRACE_S)
        except subprocess.TimeoutExpired:
            logger.warning("rank %d has not ended within %.0f s and is killed", self.rank, _EXIT_GRACE_S)
            self._process.kill()
            self._process.wait(_EXIT_GRACE_S)

    def _receive(self) -> None:
        try:
            for frame in self._channel.receive():
                self._messages.put(from_rank.decode(frame.payload))
        except Exception:
            logger.exception("a message of rank %d can't be read", self.rank)
        self.has_ended = True
        self._messages.put(None)
        self._on_end()

    def _send(self, message: EncodedMessage) -> None:
        try:
            self._channel.send(message)
        except OSError as error:
            raise self._lost() from error

    def _lost(self) -> LostRankError:
        return LostRankError(f"rank {self.rank}: it has ended, expected it to go on. Restart the engine.")


def _error_of(message: FromRank) -> SensoriumError:
    if isinstance(message, RankFailed):
        return error_named(message.error, message.message)
    return EngineDeadError(f"a rank: got {type(message).__name__} out of turn. Restart the engine.")
