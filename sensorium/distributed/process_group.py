"""A group of processes on one host: the code that gloo and NCCL share."""

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
"""As `Any`, because torch's stubs lack many of its names."""
MAX_WAIT_S = 600.0
"""If a rank lets the others wait longer than this, they treat it as lost. If it has ended, they notice at once."""
_FAILURE_WAIT_S = 30.0
"""How long a rank that failed waits for the others to report the same failure."""
_POLL_S = 0.005


def now(options: Any) -> Any:
    """Options with which a GPU's collective runs on the step's own stream, without waits between streams, so that
    CUDA graphs record it."""
    options.asyncOp = False
    return options


def finish(work: Any) -> None:
    """Wait for a collective on CPUs. On GPUs there is no work object, and the stream keeps the order."""
    if work is not None:
        work.wait()


class ProcessGroup(TensorParallel):
    """Not thread-safe: collectives belong to the thread that runs passes.

    Args:
        meeting_fd: An open file without a name that all ranks share, through which they meet; empty at first. The
            caller closes it.
        rank: This process's index, from 0.
        size: The number of ranks. The constructor waits for all of them.
        device: The device of this rank's tensors.

    Raises:
        LostRankError: Another rank did not come, or has ended.
    """

    def __init__(self, meeting_fd: int, rank: int, size: int, device: torch.device) -> None:
        self.device = device
        self.rank = rank
        self.size = size
        self.num_collectives = 0
        self.is_lost = False
        """Another rank is lost, so collectives can't complete."""
        self._num_failures = 0
        self._is_apart = False
        self._meeting_fd = os.dup(meeting_fd)
        # Not torch's default group, since one process may have several engines.
        with self.noticing_losses():
            self._store: Any = _c10d.FileStore(f"/dev/fd/{self._meeting_fd}", size)
            self._group: Any = self._made(self._store)

    @abstractmethod
    def _made(self, store: Any) -> Any:
        """Make torch's group of the ranks that meet in `store`."""

    @abstractmethod
    def _gather(self, gathered: torch.Tensor, tensor: torch.Tensor) -> Any:
        """Start to gather the ranks' tensors into `gathered`, `(size, ...)`; returns torch's work object."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `TensorParallel.all_reduce`."""
        tensor = tensor.contiguous()
        with self._collective():
            finish(self._group.allreduce([tensor], now(_c10d.AllreduceOptions())))
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `TensorParallel.all_gather`."""
        tensor = tensor.contiguous()
        gathered = tensor.new_empty(self.size, *tensor.shape)
        with self._collective():
            finish(self._gather(gathered, tensor))
        return gathered.movedim(0, -2).flatten(-2)

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """See `TensorParallel.broadcast`."""
        tensor = tensor.contiguous()
        with self._collective():
            options = now(_c10d.BroadcastOptions())
            options.rootRank = source
            finish(self._group.broadcast([tensor], options))
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
            # Torch's store opens its file once more when it is deleted, and a failure there ends the process. So the
            # file stays open until then, and nothing else refers to the group: not a local of a frame either, which
            # the traceback of an error would keep.
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
        """Mark the group as lost because a rank has ended, so that nothing waits for it. Any thread may call it."""
        self.is_lost = True

    @contextmanager
    def _collective(self) -> Iterator[None]:
        if self._is_apart:
            raise RuntimeError("a layer that ranks share, where each rank does something else")
        if self._group is None:
            raise LostRankError("this rank has left its group. Restart the engine.")
        if self.is_lost:
            raise LostRankError("another rank has ended. Restart the engine.")
        self.num_collectives += 1
        with self.noticing_losses():
            yield

    @contextmanager
    def noticing_losses(self) -> Iterator[None]:
        """Within this context, a `RuntimeError` means that another rank has ended or doesn't answer."""
        try:
            yield
        except RuntimeError as error:
            self.is_lost = True
            raise LostRankError(
                "tensor parallelism: a rank has ended or doesn't answer, expected all of them. Restart the engine."
            ) from error
