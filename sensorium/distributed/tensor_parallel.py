"""The ranks that share one model layer by layer, and how a layer finds its group when it is constructed.

A rank is a process with a device. Each has a share of every parallel layer: some of its output channels, or some of its
input channels. To combine shares, all ranks must call the same collectives in the same order. They therefore run the
same passes over the same batches; only sampling is done by the first rank alone.

A layer gets its group when it is constructed (`current_tensor_parallel`), from the configuration of its engine, and
keeps it. Outside of an engine there is one rank, and collectives do nothing.
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
    """One of `count` equal shares; `WHOLE` is the only one of 1.

    Several ranks may have the same share, for example a key/value head that all of them use.
    """

    index: int = 0
    count: int = 1

    def of(self, size: int, what: str) -> int:
        """The size of a share of `size`.

        Raises:
            ConfigError: `size` can't be divided evenly. The message names it as `what`.
        """
        if size % self.count:
            raise ConfigError(
                f"tensor_parallel_size: got {self.count} for {size} {what}, expected a divisor of {size}. Lower "
                "tensor_parallel_size (--tensor-parallel-size)."
            )
        return size // self.count


WHOLE = Shard()


class TensorParallel:
    """The group as one of its ranks sees it. This class is a group of one rank; see `process_group.py` for several.

    Collectives return their result, and may overwrite their input. All ranks get bitwise equal values.
    """

    rank: int = 0
    size: int = 1
    num_collectives: int = 0
    """How many collectives have run. A caller can compare it before and after some code, to see if it needs all ranks.
    """

    @property
    def shard(self) -> Shard:
        """This rank's share of a size that is divided over all ranks."""
        return Shard(self.rank, self.size)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks."""
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The ranks' tensors `(..., n)`, which have the same shape, concatenated: `(..., size * n)`."""
        return tensor

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """The values of rank `source`. The other ranks pass tensors of the same shape, which are overwritten."""
        return tensor

    def least(self, value: int) -> int:
        """The smallest of the ranks' values."""
        return value

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Within this context, ranks do different work, so a collective raises `RuntimeError`."""
        yield

    def have_all_failed(self) -> bool:
        """After an exception: whether every rank had one at the same place, so that all of them can continue.

        Otherwise a rank has ended, or some ranks wait for this one in a collective, and none can continue.
        """
        return True

    def close(self) -> None:
        """Leave the group. Ranks that wait for this one, now or later, get a `LostRankError`."""


ONE_RANK = TensorParallel()

_current: ContextVar[TensorParallel] = ContextVar("tensor_parallel", default=ONE_RANK)


@dataclass(frozen=True, slots=True)
class Division:
    """What a group divides differently from the default."""

    towers: bool = False
    """Divide the layers of media encoders. By default each rank has them whole."""
    experts: bool = False
    """Give each rank some whole experts of a mixture. By default each rank has a share of every expert."""


USUAL = Division()

_division: ContextVar[Division] = ContextVar("division", default=USUAL)


def current_tensor_parallel() -> TensorParallel:
    """The group of the layers that are being constructed."""
    return _current.get()


@contextmanager
def constructing_for(group: TensorParallel, division: Division = USUAL) -> Iterator[None]:
    """Within this context, new layers belong to `group`. With `ONE_RANK`, each rank has them whole."""
    tokens = _current.set(group), _division.set(division)
    try:
        yield
    finally:
        _current.reset(tokens[0])
        _division.reset(tokens[1])


def current_division() -> Division:
    """The division that applies to the layers that are being constructed."""
    return _division.get()


@contextmanager
def constructing_tower(*sizes: int) -> Iterator[None]:
    """Within this context, new layers are part of a media encoder. Each rank has them whole, unless towers are to be
    divided and the number of ranks divides each of `sizes`, such as a number of heads."""
    group = _current.get()
    is_divided = current_division().towers and all(size % group.size == 0 for size in sizes)
    with constructing_for(group if is_divided else ONE_RANK):
        yield
