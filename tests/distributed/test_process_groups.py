"""What GPUs' groups ask of NCCL, without one: that of two processes over gloo is tested with their engine."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed

from sensorium.anonymous_file import anonymous_file
from sensorium.distributed import groups, nccl
from sensorium.distributed.gloo import GlooGroup
from sensorium.distributed.nccl import ENVIRONMENT, NcclGroup
from sensorium.errors import LostRankError

CPU = torch.device("cpu")


class FakeNccl:
    """A group of two, of which the other has the same tensors; says how it was called."""

    Options = SimpleNamespace

    def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
        self.calls: list[tuple[str, bool]] = []
        self.num_aborts = 0
        self.seen = {name: os.environ.get(name) for name in ENVIRONMENT}
        store.set(f"rank {rank}", "here")

    def allreduce(self, tensors: list[torch.Tensor], options: Any) -> None:
        self._called("allreduce", options)
        tensors[0] *= 2

    def broadcast(self, tensors: list[torch.Tensor], options: Any) -> None:
        self._called(f"broadcast from {options.rootRank}", options)

    def _allgather_base(self, gathered: torch.Tensor, tensor: torch.Tensor, options: Any) -> None:
        self._called("allgather", options)
        gathered[:] = tensor

    def abort(self) -> None:
        self.num_aborts += 1

    def _called(self, name: str, options: Any) -> None:
        if self.num_aborts:
            raise RuntimeError("NCCL communicator was aborted")
        self.calls.append((name, options.asyncOp))


@pytest.fixture
def meeting_fd() -> Iterator[int]:
    fd = anonymous_file()
    yield fd
    os.close(fd)


@pytest.fixture(autouse=True)
def fake_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "ProcessGroupNCCL", FakeNccl, raising=False)
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")  # so that what is set here is taken back
        monkeypatch.delenv(name)


def made(meeting_fd: int) -> tuple[NcclGroup, FakeNccl]:
    group = NcclGroup(meeting_fd, 0, 2, CPU)
    fake: FakeNccl = group._group
    return group, fake


def test_collectives_run_on_the_stream_of_the_step(meeting_fd: int) -> None:
    """With `asyncOp`, NCCL's own stream would run them; so they are in a recorded pass, and in order."""
    group, fake = made(meeting_fd)
    assert fake.calls == [("allgather", False)], "ranks connect before anything is recorded"
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert group.all_gather(x).tolist() == [[1, 2, 1, 2], [3, 4, 3, 4]]
    assert group.all_reduce(x).tolist() == [[2, 4], [6, 8]]
    assert group.broadcast(x, 1) is x
    assert group.least(7) == 7
    assert fake.calls[1:] == [(each, False) for each in ("allgather", "allreduce", "broadcast from 1", "allgather")]
    assert group.num_collectives == len(fake.calls)
    group.close()
    group.close()
    assert fake.num_aborts == 1


def test_a_lost_rank_ends_what_devices_wait_for(meeting_fd: int) -> None:
    """No collective of a GPU fails by itself when another rank ends."""
    group, fake = made(meeting_fd)
    group.lose()
    assert fake.num_aborts == 1
    assert not group.have_all_failed()
    for collective in (group.all_reduce, group.all_gather, group.broadcast):
        with pytest.raises(LostRankError, match="Restart the engine"):
            collective(torch.ones(2))
    group.close()
    assert fake.num_aborts == 1


def test_multicast_is_off_unless_it_is_asked_for(meeting_fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    group, fake = made(meeting_fd)
    assert fake.seen == ENVIRONMENT
    group.close()
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    group, fake = made(meeting_fd)
    assert fake.seen == {**ENVIRONMENT, "NCCL_NVLS_ENABLE": "1"}
    group.close()


def test_what_is_done_apart_has_no_collectives(meeting_fd: int) -> None:
    group, fake = made(meeting_fd)
    with group.apart(), pytest.raises(RuntimeError, match="each rank does something else"):
        group.all_reduce(torch.ones(2))
    assert group.all_reduce(torch.ones(2)).tolist() == [2, 2]
    assert len(fake.calls) == 2
    group.close()


def test_the_device_decides_which_group(meeting_fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(nccl.NcclGroup, "least", lambda self, value: value)
    group = groups.join(torch.device("cuda:1"), meeting_fd, 1, 2)
    assert isinstance(group, NcclGroup)
    assert chosen == [torch.device("cuda:1")]
    group.close()
    alone = groups.join(CPU, meeting_fd, 0, 1)
    assert isinstance(alone, GlooGroup)
    assert alone.all_reduce(torch.ones(2)).tolist() == [1, 1]
    alone.close()
    with pytest.raises(LostRankError, match="left its group"):
        alone.all_reduce(torch.ones(2))


def test_an_error_that_is_kept_keeps_no_group(meeting_fd: int) -> None:
    """It did, by a local in its traceback; deleted after the file was closed, torch's store ended the process."""
    alone = groups.join(CPU, meeting_fd, 0, 1)
    made = weakref.ref(alone._group)
    with pytest.raises(LostRankError) as caught:
        alone.broadcast(torch.ones(2), source=5)
    alone.close()
    assert made() is None
    assert caught.tb is not None
