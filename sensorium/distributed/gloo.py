"""A group of processes on one host, by gloo over its loopback device."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
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


class GlooGroup(TensorParallel):
    """Not thread-safe: collectives belong to the thread that runs passes.

    Args:
        meeting_fd: An open file without a name that all ranks have, empty at first. The caller closes it.
        rank: This process, from 0.
        size: All of them. The constructor waits for them.

    Raises:
        LostRankError: Another rank did not come, or has ended.
    """

    def __init__(self, meeting_fd: int, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.is_lost = False
        """A rank is gone: nothing that waits for it will come."""
        self._num_failures = 0
        # No default group: several engines may live in one process.
        options = _c10d.ProcessGroupGloo._Options()  # noqa: SLF001 -- torch has no other way to choose a device
        options._timeout = timedelta(seconds=MAX_WAIT_S)  # noqa: SLF001
        options._devices = [_c10d.ProcessGroupGloo.create_device(hostname="127.0.0.1")]  # noqa: SLF001
        self._meeting_fd = os.dup(meeting_fd)
        with self._noticing_losses():
            self._store: Any = _c10d.FileStore(f"/dev/fd/{self._meeting_fd}", size)
            self._group: Any = _c10d.ProcessGroupGloo(self._store, rank, size, options)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `TensorParallel.all_reduce`."""
        tensor = tensor.contiguous()
        with self._noticing_losses():
            self._members.allreduce([tensor]).wait()
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `TensorParallel.all_gather`."""
        tensor = tensor.contiguous()
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        with self._noticing_losses():
            self._members.allgather([gathered], [tensor]).wait()
        return torch.cat(gathered, dim=-1)

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `TensorParallel.broadcast`."""
        tensor = tensor.contiguous()
        with self._noticing_losses():
            self._members.broadcast([tensor]).wait()
        return tensor

    def least(self, value: int) -> int:
        """See `TensorParallel.least`."""
        return int(self.all_gather(torch.tensor([value])).min())

    def have_all_failed(self) -> bool:
        """See `TensorParallel.have_all_failed`."""
        if self.is_lost:
            return False
        self._num_failures += 1
        key = f"failures {self._num_failures}"
        deadline_s = time.monotonic() + _FAILURE_WAIT_S
        with self._noticing_losses():
            self._store.add(key, 1)
            while self._store.add(key, 0) < self.size:
                if time.monotonic() > deadline_s:
                    return False
                time.sleep(_POLL_S)
        return True

    def close(self) -> None:
        """See `TensorParallel.close`."""
        if self._group is not None:
            self._group = self._store = None
            os.close(self._meeting_fd)

    @property
    def _members(self) -> Any:
        if self._group is None:
            raise LostRankError("this rank has left its group. Restart the engine.")
        return self._group

    @contextmanager
    def _noticing_losses(self) -> Iterator[None]:
        """What gloo raises means that another rank is gone, or doesn't answer."""
        try:
            yield
        except RuntimeError as error:
            self.is_lost = True
            raise LostRankError(
                "tensor parallelism: a rank has ended or doesn't answer, expected all of them. Restart the engine."
            ) from error
