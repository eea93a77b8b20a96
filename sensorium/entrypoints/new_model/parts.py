"""How each part of a model is made again: its class, of transformers or of this engine, and its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_OWN_TOWERS = {
    "CLIPVisionModel": "sensorium.model_executor.models.clip",
    "SiglipVisionModel": "sensorium.model_executor.models.siglip",
}
"""Towers whose class here gives the layers' outputs that a config names."""


@dataclass(frozen=True, slots=True)
class Part:
    """A tower, a projector, or a parameter beside them."""

    name: str
    hf_class: str
    """The class that the file makes it of; empty for a parameter."""
    module: str
    """Where the class is that the file uses; empty for those of torch."""
    made: tuple[str, ...] | None
    """The arguments that make it; None: they couldn't be found."""
    is_tower: bool
    num_parameters: int


def part_of(name: str, part: nn.Module | nn.Parameter, config: Any) -> Part:
    """What is known of a part of a model without memory."""
    if isinstance(part, nn.Parameter):
        return Part(name, "", "", tuple(map(str, part.shape)), is_tower=False, num_parameters=part.numel())
    kind = type(part)
    size = sum(each.numel() for each in part.parameters())
    is_tower = any(isinstance(each, nn.ModuleList) and len(each) for each in part.modules())
    if kind.__module__.startswith("torch."):
        return Part(name, f"nn.{kind.__name__}", "", _of_torch(part), is_tower, size)
    config_name = next((each for each, value in _configs(config) if value is getattr(part, "config", None)), None)
    layer = getattr(config, "vision_feature_layer", None)
    if kind.__name__ in _OWN_TOWERS and layer is not None and config_name is not None:
        layers = "[hf_config.vision_feature_layer]" if isinstance(layer, int) else "hf_config.vision_feature_layer"
        made = (config_name, layers, "config.quant_config", f'prefix=maybe_prefix(prefix, "{name}")')
        return Part(name, kind.__name__, _OWN_TOWERS[kind.__name__], made, is_tower, size)
    argument = config_name if config_name is not None else _argument(part, config)
    return Part(name, kind.__name__, kind.__module__, None if argument is None else (argument,), is_tower, size)


def _configs(config: Any) -> Iterator[tuple[str, Any]]:
    """The configs in a config, as a constructor writes them."""
    yield "hf_config", config
    for name, value in vars(config).items():
        if name.endswith("_config") and hasattr(value, "to_dict"):
            yield f"hf_config.{name}", value


def _argument(part: nn.Module, config: Any) -> str | None:
    """The config from which a class makes a module of the same sizes, if it takes one and nothing else."""
    shapes = {name: tensor.shape for name, tensor in part.state_dict().items()}
    names = list(inspect.signature(type(part)).parameters.values())
    if not names or sum(each.default is each.empty for each in names) > 1:
        return None
    for name, value in _configs(config):
        try:
            with torch.device("meta"):
                other = type(part)(value)
        except Exception:  # noqa: BLE001  it isn't made of this config
            continue
        if {each: tensor.shape for each, tensor in other.state_dict().items()} == shapes:
            return name
    return None


def _of_torch(part: nn.Module) -> tuple[str, ...] | None:
    if isinstance(part, nn.Linear):
        return str(part.in_features), str(part.out_features), f"bias={part.bias is not None}"
    if isinstance(part, nn.Embedding):
        return str(part.num_embeddings), str(part.embedding_dim)
    if isinstance(part, nn.LayerNorm):
        return str(part.normalized_shape[0]), f"eps={part.eps}"
    return None
