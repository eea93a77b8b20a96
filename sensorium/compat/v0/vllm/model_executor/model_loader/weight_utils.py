"""Helpers for `load_weights` methods that Sensorium's module of this name lacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from sensorium.compat.v0.vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from sensorium.model_executor.model_loader.weight_utils import default_weight_loader

__all__ = ["composed_weight_loader", "maybe_remap_kv_scale_name", "row_parallel_weight_loader", "sharded_weight_loader"]

Loader = Callable[[torch.Tensor, torch.Tensor], None]


def row_parallel_weight_loader(param: torch.Tensor, loaded_weight: torch.Tensor) -> None:
    """Copy this rank's share of the first axis; all of a parameter of one axis."""
    shard_dim = 0 if param.dim() != 1 else None
    if shard_dim is None:
        default_weight_loader(param, loaded_weight)
    else:
        sharded_weight_loader(shard_dim)(param, loaded_weight)


def sharded_weight_loader(shard_axis: int) -> Loader:
    """A loader that copies this rank's share of an axis."""

    def load(param: torch.Tensor, loaded_weight: torch.Tensor) -> None:
        size = param.shape[shard_axis]
        if loaded_weight.shape[shard_axis] == size * get_tensor_model_parallel_world_size():
            loaded_weight = loaded_weight.narrow(shard_axis, get_tensor_model_parallel_rank() * size, size)
        default_weight_loader(param, loaded_weight)

    return load


def composed_weight_loader(loader: Loader, fn: Callable[[torch.Tensor], torch.Tensor]) -> Loader:
    """A loader that applies a function to what was copied."""

    def load(param: torch.Tensor, loaded_weight: torch.Tensor) -> None:
        loader(param, loaded_weight)
        param.data.copy_(fn(param))

    return load


def maybe_remap_kv_scale_name(name: str, params_dict: Mapping[str, Any]) -> str | None:
    """The parameter that a checkpoint's key fills; None for scales of a quantized cache, which there is not."""
    return None if name.endswith((".kv_scale", ".k_scale", ".v_scale")) and name not in params_dict else name
