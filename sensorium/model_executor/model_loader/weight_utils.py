"""Reading checkpoints and putting tensors into parameters: what `load_weights` methods are written with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from sensorium.checkpoint import INDEX_NAME
from sensorium.errors import WeightsError
from sensorium.model_executor.models.weights import default_weight_loader

__all__ = [
    "FUSED_WEIGHTS",
    "default_weight_loader",
    "load_fused_weights",
    "load_parameter",
    "safetensors_weights",
]

FUSED_WEIGHTS: Mapping[str, tuple[str, int | str]] = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
"""Where the parts of attention and MLP go, as most checkpoints call them."""


def load_parameter(param: torch.Tensor, loaded_weight: torch.Tensor, *shard_id: Any) -> None:
    """Fill a parameter through its own `weight_loader` if it carries one."""
    loader: Callable[..., None] = getattr(param, "weight_loader", default_weight_loader)
    loader(param, loaded_weight, *shard_id)


def load_fused_weights(
    module: nn.Module,
    weights: Iterable[tuple[str, torch.Tensor]],
    fused: Mapping[str, tuple[str, int | str]],
) -> set[str]:
    """Fill a module from a checkpoint that stores the parts of its fused layers separately.

    Args:
        module: Whose parameters (and persistent buffers) are filled.
        weights: Names relative to `module`, and tensors.
        fused: Part name to (fused layer's name, shard id), such as `{"q_proj": ("qkv_proj", "q")}`. It
            applies where the module has the fused layer, so that a checkpoint with fused tensors loads as
            well.

    Returns:
        The names of the parameters that were (at least partly) filled.

    Raises:
        WeightsError: A name or shape fits nothing in the module.
    """
    targets: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
    targets.update(persistent_buffers(module))
    filled = set()
    for name, tensor in weights:
        candidates = (fused_target(name, fused), (name, ()), (stacked_target(name), ()))
        found = next((each for each in candidates if each[0] in targets), None)
        if found is None:
            raise WeightsError(
                f"checkpoint key: got {name!r}, expected a parameter of {type(module).__name__}. "
                "Map or ignore it in the model's load_weights."
            )
        target_name, shard_id = found
        load_parameter(targets[target_name], tensor, *shard_id)
        filled.add(target_name)
    return filled


Part: TypeAlias = tuple[()] | tuple[int | str | tuple[int, int]]
"""A shard id, where there is one."""


def fused_target(name: str, fused: Mapping[str, tuple[str, int | str]]) -> tuple[str, Part]:
    """The fused parameter's name and the shard id for the name of a part; the name itself for any other.

    The experts of a mixture are one layer, too: of `experts.3.up_proj.weight`, `experts.gate_up_proj.weight` is filled
    with the shard id `(3, 1)`, and of `experts.3.down_proj.weight`, `experts.down_proj.weight` with `(3, 0)`.
    """
    parts = name.split(".")
    expert = next((i for i, part in enumerate(parts) if part.isdigit() and parts[i - 1] == "experts"), None)
    index = None if expert is None else int(parts.pop(expert))
    for position, part in enumerate(parts):
        if part in fused:
            parts[position], shard_id = fused[part]
            if index is None:
                return ".".join(parts), (shard_id,)
            return ".".join(parts), ((index, int(shard_id)),)
    return ".".join(parts), () if index is None else ((index, 0),)


def stacked_target(name: str) -> str:
    """The parameter's name for a tensor that has the weights, or biases, of all experts and is named as their layer."""
    return f"{name.removesuffix('_bias')}.bias" if name.endswith("_bias") else f"{name}.weight"


def persistent_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that checkpoints contain, such as running means, by name."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, child in module.named_modules()
        for name, buffer in child.named_buffers(recurse=False)
        if name not in child._non_persistent_buffers_set  # noqa: SLF001  torch says it nowhere else
    }


def safetensors_weights(files: Iterable[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of safetensors files. The tensors are views of the mapped files, not copies.

    Raises:
        WeightsError: A file is damaged or can't be read, or a key stands in two files.
    """
    file_of: dict[str, str] = {}
    for file in files:
        for name, tensor in _tensors_of(file):
            if name in file_of:
                raise WeightsError(
                    f"checkpoint key {name!r}: got it in {file_of[name]} and in {file.name}, expected it once. "
                    f"Remove the file that doesn't belong, or add {INDEX_NAME}."
                )
            file_of[name] = file.name
            yield name, tensor


def _tensors_of(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 -- the reader can't be iterated
                yield name, reader.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"checkpoint file {file.name}: got {error}, expected a complete safetensors file. Download it again."
        ) from error
