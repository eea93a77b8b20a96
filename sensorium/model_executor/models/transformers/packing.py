"""Runs the linear layers of transformers' modules by this engine's kernels, with weights in the kernels' layout.

A module may read a linear layer's weight without calling the layer. So the weights are first only set aside: if the
model still computes the same, no module reads them. Then `KernelLinear` layers take the places of each in turn, and its
weight is freed, so that there is never a second copy of all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from sensorium.config import EngineConfig
from sensorium.errors import ConfigError
from sensorium.model_executor.layers.quantization import QuantizationConfig, checkpoint_settings
from sensorium.model_executor.layers.quantization.layer import WeightedLayer


class KernelLinear(WeightedLayer):
    """What an `nn.Linear` computes, by the `LinearMethod` that a quantization chooses.

    Args:
        layer: Whose place it takes.
        weight: The layer's own, `(out_features, in_features)`.
        quant_config: How the weight is held; None: in float.
        prefix: The layer's name in the model.
        keeps_weight: Whether an embedding's table is the same weight, and needs it as it is.
    """

    def __init__(
        self,
        layer: nn.Linear,
        weight: nn.Parameter,
        quant_config: QuantizationConfig | None,
        prefix: str,
        *,
        keeps_weight: bool = False,
    ) -> None:
        with torch.device("meta"):
            super().__init__(layer.in_features, [layer.out_features], weight.dtype, quant_config, prefix)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = weight
        self.bias = layer.bias
        self.keeps_weight = keeps_weight
        self.finish_loading()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`(..., in_features)` to `(..., out_features)`."""
        return self._multiply(self, input, self.bias)


@dataclass(frozen=True, slots=True, eq=False)
class _Aside:
    """A layer and its original weight."""

    layer: nn.Linear
    weight: torch.nn.Parameter


class SetAside:
    """Linear layers whose weights are kept apart from them.

    Args:
        model: Any.
        run: Runs passes. Layers that they don't call are left alone.
    """

    def __init__(self, model: nn.Module, run: Callable[[], object]) -> None:
        self._model = model
        self._layers = [_Aside(layer, layer.get_parameter("weight")) for layer in _called(model, run)]
        for each in self._layers:
            each.layer.forward = partial(F.linear, weight=each.weight, bias=each.layer.bias)  # type: ignore[method-assign]
            each.layer.weight = _without_memory(each.weight)

    def restore(self) -> None:
        """Leave the layers as they were."""
        for each in self._layers:
            del each.layer.forward
            each.layer.weight = each.weight

    def hand_over(self, quant_config: QuantizationConfig | None = None) -> None:
        """Let `KernelLinear` layers take their places. `quant_config`: how these hold the weights; None: in float."""
        places = _places(self._model, [each.layer for each in self._layers])
        tables = {id(each.weight) for each in self._model.modules() if isinstance(each, nn.Embedding)}
        while self._layers:
            each = self._layers.pop()
            found = places[id(each.layer)]
            is_table = id(each.weight) in tables
            made = KernelLinear(each.layer, each.weight, quant_config, found[0].prefix, keeps_weight=is_table)
            for place in found:
                setattr(place.parent, place.name, made)
            each.layer.forward = made.forward  # type: ignore[method-assign]  # for those that hold the layer itself


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """Where a layer stands in a model."""

    parent: nn.Module
    name: str
    prefix: str
    """Its name in the whole model."""


def _places(model: nn.Module, layers: list[nn.Linear]) -> dict[int, list[_Place]]:
    """All places of layers, which several modules may have, by the layer's id."""
    found: dict[int, list[_Place]] = {id(layer): [] for layer in layers}
    for prefix, parent in model.named_modules():
        for name, child in vars(parent)["_modules"].items():  # `named_children` names a layer once
            if id(child) in found:
                found[id(child)].append(_Place(parent, name, f"{prefix}.{name}".removeprefix(".")))
    return found


def check_quantization_of(config: EngineConfig) -> None:
    """Refuse weights that can't be held as asked for.

    Raises:
        ConfigError: The checkpoint is quantized already, or nothing would be seen of which layers may be.
    """
    if config.quant_config is None:
        return
    asked = f"quantization: got {config.quant_config.name!r} for {config.model_config.architecture}, which runs by the "
    if checkpoint_settings(config.model_config.hf_config) is not None:
        raise ConfigError(
            f"{asked}modules of transformers, of a checkpoint that is quantized already, expected float weights. Use "
            "the checkpoint that it was made from; quantization (--quantization) quantizes that at load."
        )
    if config.model_config.load_check == "off":
        raise ConfigError(
            f"{asked}modules of transformers, and load_check 'off', expected it on: the check finds the layers that "
            "can be quantized. Leave load_check (--load-check) out."
        )


def _called(model: nn.Module, run: Callable[[], object]) -> list[nn.Linear]:
    """Plain linear layers that a pass calls and whose weights are nobody else's, but for tables of embeddings."""
    others = [module for module in model.modules() if not isinstance(module, nn.Embedding)]
    users = Counter(id(parameter) for module in others for parameter in module.parameters(recurse=False))
    found: dict[int, nn.Linear] = {}
    handles = [
        module.register_forward_pre_hook(partial(_note, found))
        for module in model.modules()
        if type(module) is nn.Linear and users[id(module.weight)] == 1
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return list(found.values())


def _note(found: dict[int, nn.Linear], module: nn.Module, _args: object) -> None:
    assert isinstance(module, nn.Linear)
    found[id(module)] = module


def _without_memory(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
