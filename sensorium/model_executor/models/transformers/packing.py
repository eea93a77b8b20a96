"""Runs the linear layers of transformers' modules by this engine's kernels, with weights in the kernels' layout.

A module may read a linear layer's weight without calling the layer. So the weights are first only set aside: if the
model still computes the same, no module reads them. Then each is packed and freed in turn, so that there is never a
second copy of all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from sensorium.kernels import pack, packed_linear


@dataclass(frozen=True, slots=True, eq=False)
class _Aside:
    """A layer and its original weight."""

    layer: nn.Linear
    weight: torch.nn.Parameter


class SetAside:
    """Linear layers whose weights are kept apart from them.

    Args:
        model: Any module.
        run: Runs a pass. Layers that it doesn't call are left alone.
    """

    def __init__(self, model: nn.Module, run: Callable[[], object]) -> None:
        self._layers = [_Aside(layer, layer.get_parameter("weight")) for layer in _called(model, run)]
        for each in self._layers:
            each.layer.forward = partial(F.linear, weight=each.weight, bias=each.layer.bias)  # type: ignore[method-assign]
            each.layer.weight = _without_memory(each.weight)

    def __len__(self) -> int:
        return len(self._layers)

    def restore(self) -> None:
        """Leave the layers as they were."""
        for each in self._layers:
            del each.layer.forward
            each.layer.weight = each.weight

    def pack(self) -> None:
        """Pack the weights, and let the layers multiply with the packed ones."""
        while self._layers:
            each = self._layers.pop()
            packed = pack(each.weight)
            each.layer.forward = partial(packed_linear, packed=packed, bias=each.layer.bias)  # type: ignore[method-assign]
            if packed.panels is None:
                each.layer.weight = each.weight
            else:  # a buffer, so that it is one of the model's tensors
                each.layer.register_buffer("packed_weight", packed.panels, persistent=False)


def _called(model: nn.Module, run: Callable[[], object]) -> list[nn.Linear]:
    """Plain linear layers that a pass calls and whose weights no other module shares."""
    users = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
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
