"""Groups of ranks. V0 had one of each kind in a process; a model here has its own, which it takes when it is
constructed.

Code of V0 asks in constructors and in `forward`. In the latter, where nothing says which model runs, the answer is the
group of the model that was constructed last: a process of several ranks has one model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sensorium.distributed import ONE_RANK, TensorParallel, current_tensor_parallel
from sensorium.errors import ModelError
from sensorium.model_executor.adapter import config_in_construction

__all__ = [
    "get_pp_group",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_world_size",
    "get_tp_group",
]


@dataclass(frozen=True, slots=True)
class GroupCoordinator:
    """A group under V0's names."""

    group: TensorParallel

    @property
    def rank_in_group(self) -> int:
        """This rank, from 0."""
        return self.group.rank

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self.group.size

    @property
    def is_first_rank(self) -> bool:
        """Whether this is rank 0."""
        return self.group.rank == 0

    @property
    def is_last_rank(self) -> bool:
        """Whether this is the last rank."""
        return self.group.rank == self.group.size - 1

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        """The sum over ranks."""
        return self.group.all_reduce(input_.clone() if self.group.size > 1 else input_)

    def all_gather(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """The ranks' tensors side by side along the last axis.

        Raises:
            ModelError: `dim` is another axis.
        """
        if self.group.size > 1 and dim not in (-1, input_.dim() - 1):
            raise ModelError(f"all_gather: got dim {dim}, expected -1. Move that axis to the end.")
        return self.group.all_gather(input_)


_last: list[TensorParallel] = [ONE_RANK]


def get_tp_group() -> GroupCoordinator:
    """The ranks that share the model which is being constructed, or was constructed last."""
    if config_in_construction() is not None:
        _last[0] = current_tensor_parallel()
    return GroupCoordinator(_last[0])


def get_pp_group() -> GroupCoordinator:
    """The stages that a model's layers are divided into: one."""
    return GroupCoordinator(ONE_RANK)


def get_tensor_model_parallel_world_size() -> int:
    """How many ranks share the model."""
    return get_tp_group().world_size


def get_tensor_model_parallel_rank() -> int:
    """Which of them this is."""
    return get_tp_group().rank_in_group
