"""The ranks that share one model layer by layer, and how a layer that is being constructed learns of them.

A rank is a process with a device. Each has a share of every parallel layer: some of its output channels, or some of its
input channels. Where shares must come together, all ranks call the same collective, in the same order; so they run the
same passes over the same batches, and only sampling is the first rank's alone.

Layers take the group when they are constructed (`current_tensor_parallel`), from the configuration of the engine that
they are constructed for, and keep it. Outside of an engine there is one rank, and collectives do nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sensorium.errors import ConfigError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `count` equal shares. `WHOLE` is everything.

    Several ranks may have the same share, such as that of a key/value head which they all read.
    """

    index: int = 0
    count: int = 1

    def of(self, size: int, what: str) -> int:
        """How much of `size` a share is.

        Raises:
            ConfigError: It can't be shared evenly; `what` says what it is.
        """
        if size % self.count:
            raise ConfigError(
                f"tensor_parallel_size: got {self.count} for {size} {what}, expected a divisor of {size}. Lower "
                "tensor_parallel_size (--tensor-parallel-size)."
            )
        return size // self.count


WHOLE = Shard()


class TensorParallel:
    """The group as one of its ranks sees it. This one is alone; see `gloo.py` for several.

    Collectives return their result, and may overwrite their input. All ranks get the same values, to the last bit.
    """

    rank: int = 0
    size: int = 1
    num_collectives: int = 0
    """How many there have been, so that one can find out whether some code needs all ranks."""

    @property
    def shard(self) -> Shard:
        """This rank's share of what is divided over all ranks."""
        return Shard(self.rank, self.size)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks."""
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The ranks' tensors `(..., n)`, which are of one shape, side by side: `(..., size * n)`."""
        return tensor

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """The values of rank `source`; the others' tensors say the shape and are filled."""
        return tensor

    def least(self, value: int) -> int:
        """The least of the ranks' values."""
        return value

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Within it, each rank does something else, so that a collective is an error: a `RuntimeError`."""
        yield

    def have_all_failed(self) -> bool:
        """After an exception: whether every rank met one at the same place, so that all may go on together.

        Otherwise one is gone, or some wait in a collective for this one, and there is no going on.
        """
        return True

    def close(self) -> None:
        """Leave the group. Who waits for this rank, then or later, gets a `LostRankError`."""


ONE_RANK = TensorParallel()

_current: ContextVar[TensorParallel] = ContextVar("tensor_parallel", default=ONE_RANK)


@dataclass(frozen=True, slots=True)
class Division:
    """What a group divides otherwise than by default."""

    towers: bool = False
    """Encoders of media by their layers. By default each rank has them whole."""
    experts: bool = False
    """Mixtures by experts, of which each rank has some, whole. By default each rank has a share of every expert."""


USUAL = Division()

_division: ContextVar[Division] = ContextVar("division", default=USUAL)


def current_tensor_parallel() -> TensorParallel:
    """The group that a layer which is being constructed belongs to."""
    return _current.get()


@contextmanager
def constructing_for(group: TensorParallel, division: Division = USUAL) -> Iterator[None]:
    """Within it, new layers belong to `group`. With `ONE_RANK`: each rank has them whole."""
    tokens = _current.set(group), _division.set(division)
    try:
        yield
    finally:
        _current.reset(tokens[0])
        _division.reset(tokens[1])


def current_division() -> Division:
    """What the group of a layer that is being constructed divides otherwise than by default."""
    return _division.get()


@contextmanager
def constructing_tower(*sizes: int) -> Iterator[None]:
    """Within it, new layers are part of an encoder of media. Each rank has them whole, unless towers are to be divided
    and each of `sizes`, such as a number of heads, can be."""
    group = _current.get()
    is_divided = current_division().towers and all(size % group.size == 0 for size in sizes)
    with constructing_for(group if is_divided else ONE_RANK):
        yield
