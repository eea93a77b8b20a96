"""Tensor parallelism: the group of ranks that share one model, and what layers ask of it. Doesn't import torch."""

from sensorium.distributed.tensor_parallel import (
    ONE_RANK,
    WHOLE,
    Division,
    Shard,
    TensorParallel,
    constructing_for,
    constructing_tower,
    current_division,
    current_tensor_parallel,
)

__all__ = [
    "ONE_RANK",
    "WHOLE",
    "Division",
    "Shard",
    "TensorParallel",
    "constructing_for",
    "constructing_tower",
    "current_division",
    "current_tensor_parallel",
]
