"""Ranks as threads of one process: quick, and without anything to end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from sensorium.distributed import TensorParallel, constructing_for
from tests.helpers.waiting import HANG_S

T = TypeVar("T")


class _Meeting:
    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.tensors: list[torch.Tensor | None] = [None] * size


class ThreadRank(TensorParallel):
    """A rank that is a thread; what is exchanged lies in a list that all have."""

    def __init__(self, meeting: _Meeting, rank: int, size: int) -> None:
        self._meeting = meeting
        self.rank = rank
        self.size = size
        self._is_apart = False

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchanged(tensor)).sum(0)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._exchanged(tensor), -1)

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        return tensor.copy_(self._exchanged(tensor)[source])

    def least(self, value: int) -> int:
        return int(torch.cat(self._exchanged(torch.tensor([value]))).min())

    @contextmanager
    def apart(self) -> Iterator[None]:
        self._is_apart = True
        try:
            yield
        finally:
            self._is_apart = False

    def _exchanged(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        if self._is_apart:
            raise RuntimeError("a layer that ranks share, where each rank does something else")
        self.num_collectives += 1
        self._meeting.tensors[self.rank] = tensor.clone()
        self._meeting.barrier.wait(HANG_S)
        tensors = [each for each in self._meeting.tensors if each is not None]
        self._meeting.barrier.wait(HANG_S)
        return tensors


def on_ranks(size: int, call: Callable[[TensorParallel], T]) -> list[T]:
    """What `call` returns on each of `size` ranks, for which it may construct layers."""
    meeting = _Meeting(size)

    def run(rank: int) -> T:
        group = ThreadRank(meeting, rank, size)
        try:
            with constructing_for(group), torch.inference_mode():
                return call(group)
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    # A rank that waits for one which failed has a broken barrier; the cause is the other's.
    for error in sorted(errors, key=lambda each: isinstance(each, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]
