"""Data parallelism on one host: a process per GPU, whose gradients are summed after every step.

The processes are equal: each holds all weights and both optimizers, takes its share of a step's micro-batches, and
makes the same update. A single process needs no process group, and every operation here is then the identity.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed, multiprocessing, nn

# A process that waits longer for the others gives up: longer than the compilation, far shorter than a run.
_TIMEOUT = timedelta(minutes=4)


@dataclass(frozen=True, slots=True)
class Team:
    """One process of a run: ``rank`` of ``size``, computing on ``device``."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_leader(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Replace a tensor on ``device`` by its sum over the team."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def agree(self, value: float) -> float:
        """The leader's value; waits for the device."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64, device=self.device)
        distributed.broadcast(shared, src=0)
        return float(shared)

    def share_weights(self, network: nn.Module) -> None:
        """Give every process the leader's weights."""
        if self.size > 1:
            for tensor in network.state_dict().values():
                distributed.broadcast(tensor, src=0)


class SummedGradients:
    """The gradients of a network, gathered into one tensor, so that one transfer sums them over a team.

    A parameter that no micro-batch used has a gradient of zero, in every process: the update doesn't depend on their
    number.
    """

    def __init__(self, network: nn.Module, team: Team) -> None:
        self._parameters = list(network.parameters())
        self._team = team
        sizes = [parameter.numel() for parameter in self._parameters]
        self._flat = torch.zeros(sum(sizes), device=team.device)
        pieces = zip(self._parameters, self._flat.split(sizes), strict=True)
        self._pieces = [piece.view_as(parameter) for parameter, piece in pieces]

    def sum_and_clip(self, max_norm: float) -> None:
        """Sum the parameters' gradients over the team, then scale them down to a norm of at most ``max_norm``."""
        self._flat.zero_()
        gradients = zip(self._pieces, self._parameters, strict=True)
        pairs = [(piece, parameter.grad) for piece, parameter in gradients if parameter.grad is not None]
        torch._foreach_copy_([piece for piece, _ in pairs], [gradient for _, gradient in pairs])
        self._team.sum(self._flat)
        self._flat.mul_((max_norm / (self._flat.norm() + 1e-6)).clamp(max=1.0))
        for parameter, piece in zip(self._parameters, self._pieces, strict=True):
            parameter.grad = piece

    def clear(self) -> None:
        """Forget the gradients: the next backward pass makes new ones."""
        for parameter in self._parameters:
            parameter.grad = None


def max_processes() -> int:
    """One process per GPU, or a single one without any."""
    return max(torch.cuda.device_count(), 1)


def run_team(size: int, work: Callable[[Team], None]) -> None:
    """Call ``work`` in ``size`` processes and wait; the first error of any of them ends all.

    ``work`` is pickled: a function of a module, or a ``functools.partial`` of one.

    Raises:
        ValueError: there are GPUs, but fewer than ``size``.
        torch.multiprocessing.ProcessRaisedException: a process failed; its traceback is the message.
    """
    if 0 < torch.cuda.device_count() < size:
        raise ValueError(
            f"processes: got {size}, expected at most one per GPU, of which there are {torch.cuda.device_count()}. "
            "Lower --processes."
        )
    if size == 1:
        work(Team(0, 1, _device_of(0)))
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_join, args=(size, port, work), nprocs=size)


def _join(rank: int, size: int, port: int, work: Callable[[Team], None]) -> None:
    device = _device_of(rank)
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=size,
        timeout=_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    work(Team(rank, size, device))
    # Not after an error: the others would see the connection close before this process could say why.
    distributed.destroy_process_group()


def _device_of(rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)
