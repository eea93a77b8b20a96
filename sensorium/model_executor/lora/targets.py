"""Which layer of a model, and which part of it, has the weight that a layer of the Hugging Face model has.

A model's own `load_weights` knows: it renames checkpoints' names of every layout, and puts parts into fused layers. So
a copy of the model without memory is asked to load a weight of that name and shape, and what it does with it is noted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sensorium.logger import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a weight goes."""

    layer: str
    """The path of the module in the model."""
    part: int | str | None
    """The part of a fused layer, as `WeightedLayer.part_index` takes it; None for the whole layer."""


class TargetFinder:
    """Asks one model, layer by layer.

    Args:
        model: A copy without memory, which is changed: nothing can be loaded into it any more.
    """

    def __init__(self, model: nn.Module) -> None:
        self._load: Callable[[Iterator[tuple[str, torch.Tensor]]], Any] | None = getattr(model, "load_weights", None)
        self._asked: torch.Tensor | None = None
        self._found: list[Target] = []
        owners: dict[int, list[str]] = {}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, parameter in parameters.items():
            owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
        self.shared = {name for names in owners.values() if len(names) > 1 for name in names}
        """Modules whose weight is another module's, too."""
        for name, parameter in parameters.items():
            parameter.__dict__["weight_loader"] = self._noting(name.rpartition(".")[0])

    def find(self, layer: str, shape: tuple[int, int]) -> Target | None:
        """Where the weight of a layer of the Hugging Face model goes; None where it goes nowhere, or only changed.

        `shape`: `(outputs, inputs)` of the Hugging Face model's layer.
        """
        if self._load is None:
            return None
        self._found = []
        self._asked = asked = _marked(*shape)
        try:
            self._load(iter([(f"{layer}.weight", asked)]))
        except (
            Exception
        ) as error:  # whatever a class's own method raises for a name that it doesn't know, or for one alone
            logger.debug("asking where %s goes", layer, exc_info=error)
        finally:
            self._asked = None
        return self._found[0] if len(self._found) == 1 else None

    def _noting(self, layer: str) -> Callable[..., None]:
        def note(_parameter: torch.Tensor, loaded: torch.Tensor, shard_id: int | str | None = None) -> None:
            if self._asked is not None and _is_same(loaded, self._asked):
                self._found.append(Target(layer, shard_id))

        return note


def _marked(num_outputs: int, num_inputs: int) -> torch.Tensor:
    """A tensor of this shape in little memory, with strides by which a transposed one is told apart."""
    return torch.empty(num_outputs + 2 * num_inputs).as_strided((num_outputs, num_inputs), (1, 2))


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same values of the same memory, in the same order."""
    return (
        not one.is_meta
        and one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
    )
