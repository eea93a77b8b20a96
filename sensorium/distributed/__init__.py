"""Devices that share one model: the group that they form, and what layers ask of it. Loads no torch by itself."""

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
