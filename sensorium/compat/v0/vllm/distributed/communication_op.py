"""Collectives over the ranks that share a model."""

from __future__ import annotations

import torch

from sensorium.compat.v0.vllm.distributed.parallel_state import get_tp_group

__all__ = ["tensor_model_parallel_all_gather", "tensor_model_parallel_all_reduce"]


def tensor_model_parallel_all_reduce(input_: torch.Tensor) -> torch.Tensor:
    """The sum over ranks."""
    return get_tp_group().all_reduce(input_)


def tensor_model_parallel_all_gather(input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """The ranks' tensors side by side."""
    return get_tp_group().all_gather(input_, dim)
