"""A group of processes on one host: what is the same whatever carries their collectives."""

from __future__ import annotations

import os
import time
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed

from sensorium.distributed.tensor_parallel import TensorParallel
from sensorium.errors import LostRankError

_c10d: Any = distributed
"""Torch's stubs lack much of what it exports there."""
MAX_WAIT_S = 600.0
"""A rank that lets the others wait longer than this is taken for lost. One that has ended is noticed at once."""
_FAILURE_WAIT_S = 30.0
"""How long ranks wait for the others to fail as they did."""
_POLL_S = 0.005


def now(options: Any) -> Any:
    """On a GPU: on the stream that the step runs on, so that nothing has to wait for another, and graphs record it."""
    options.asyncOp = False
    return options


def finish(work: Any) -> None:
    """On a CPU, wait."""
    if work is not None:
        work.wait()


class ProcessGroup(TensorParallel):
    """Not thread-safe: collectives belong to the thread that runs passes.

    Args:
        meeting_fd: An open file without a name that all ranks have, empty at first. The caller closes it.
        rank: This process, from 0.
        size: All of them. The constructor waits for them.
        device: Where tensors are.

    Raises:
        LostRankError: Another rank did not come, or has ended.
    """

    def __init__(self, meeting_fd: int, rank: int, size: int, device: torch.device) -> None:
        self.device = device
        self.rank = rank
        self.size = size
        self.num_collectives = 0
        self.is_lost = False
        """A rank is gone: nothing that waits for it will come."""
        self._num_failures = 0
        self._is_apart = False
        self._meeting_fd = os.dup(meeting_fd)
        # No default group: several engines may live in one process.
        with self.noticing_losses():
            self._store: Any = _c10d.FileStore(f"/dev/fd/{self._meeting_fd}", size)
            self._group: Any = self._made(self._store)

    @abstractmethod
    def _made(self, store: Any) -> Any:
        """Torch's group of the ranks that meet in a store."""

    @abstractmethod
    def _gather(self, group: Any, gathered: torch.Tensor, tensor: torch.Tensor) -> Any:
        """Begin to fill `gathered`, `(size, ...)`, with the ranks' tensors."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `TensorParallel.all_reduce`."""
        tensor = tensor.contiguous()
        with self._collective() as group:
            finish(group.allreduce([tensor], now(_c10d.AllreduceOptions())))
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `TensorParallel.all_gather`."""
        tensor = tensor.contiguous()
        gathered = tensor.new_empty(self.size, *tensor.shape)
        with self._collective() as group:
            finish(self._gather(group, gathered, tensor))
        return gathered.movedim(0, -2).flatten(-2)

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """See `TensorParallel.broadcast`."""
        tensor = tensor.contiguous()
        with self._collective() as group:
            options = now(_c10d.BroadcastOptions())
            options.rootRank = source
            finish(group.broadcast([tensor], options))
        return tensor

    def least(self, value: int) -> int:
        """See `TensorParallel.least`."""
        return int(self.all_gather(torch.tensor([value], device=self.device)).min())

    def have_all_failed(self) -> bool:
        """See `TensorParallel.have_all_failed`."""
        if self.is_lost:
            return False
        self._num_failures += 1
        key = f"failures {self._num_failures}"
        deadline_s = time.monotonic() + _FAILURE_WAIT_S
        with self.noticing_losses():
            self._store.add(key, 1)
            while self._store.add(key, 0) < self.size:
                if self.is_lost or time.monotonic() > deadline_s:
                    return False
                time.sleep(_POLL_S)
        return True

    def close(self) -> None:
        """See `TensorParallel.close`."""
        if self._group is not None:
            self._group = self._store = None
            os.close(self._meeting_fd)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """See `TensorParallel.apart`."""
        self._is_apart = True
        try:
            yield
        finally:
            self._is_apart = False

    def lose(self) -> None:
        """A rank was seen to end: let nobody wait for it. Called in any thread."""
        self.is_lost = True

    @contextmanager
    def _collective(self) -> Iterator[Any]:
        if self._is_apart:
            raise RuntimeError("a layer that ranks share, where each rank does something else")
        if self._group is None:
            raise LostRankError("this rank has left its group. Restart the engine.")
        if self.is_lost:
            raise LostRankError("another rank has ended. Restart the engine.")
        self.num_collectives += 1
        with self.noticing_losses():
            yield self._group

    @contextmanager
    def noticing_losses(self) -> Iterator[None]:
        """What is raised within means that another rank is gone, or doesn't answer."""
        try:
            yield
        except RuntimeError as error:
            self.is_lost = True
            raise LostRankError(
                "tensor parallelism: a rank has ended or doesn't answer, expected all of them. Restart the engine."
            ) from error
