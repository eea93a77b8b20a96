"""Arithmetic of shares."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sensorium.errors import ConfigError

__all__ = ["divide", "ensure_divisibility", "get_pp_indices", "split_tensor_along_last_dim"]


def ensure_divisibility(numerator: int, denominator: int) -> None:
    """Raise `ConfigError` (a `ValueError`) if the division leaves a remainder."""
    if numerator % denominator:
        raise ConfigError(
            f"shares of {numerator}: got {denominator}, expected a divisor. Change tensor_parallel_size "
            "(--tensor-parallel-size)."
        )


def divide(numerator: int, denominator: int) -> int:
    """The quotient. Raises as `ensure_divisibility`."""
    ensure_divisibility(numerator, denominator)
    return numerator // denominator


def split_tensor_along_last_dim(
    tensor: torch.Tensor, num_partitions: int, contiguous_split_chunks: bool = False
) -> Sequence[torch.Tensor]:
    """Equal parts of the last axis, as views unless `contiguous_split_chunks`."""
    parts = torch.split(tensor, divide(tensor.shape[-1], num_partitions), dim=-1)
    return tuple(part.contiguous() for part in parts) if contiguous_split_chunks else parts


def get_pp_indices(num_hidden_layers: int, pp_rank: int, pp_size: int) -> tuple[int, int]:
    """The layers of a stage, as first and end. If there is a remainder, the last stages have one layer more."""
    least, rest = divmod(num_hidden_layers, pp_size)
    sizes = [least + (stage >= pp_size - rest) for stage in range(pp_size)]
    return sum(sizes[:pp_rank]), sum(sizes[: pp_rank + 1])
