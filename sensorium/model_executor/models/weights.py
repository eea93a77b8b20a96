"""Weights by name: from a checkpoint's tensors to a model's parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TypeAlias

import torch
from torch import nn

from sensorium.errors import WeightsError, WeightShapeError
from sensorium.model_executor.models.modules import PPMissingLayer
from sensorium.model_executor.weight_tracking import current_key, ignore_weight, refuse_other_kind

Weights: TypeAlias = Iterable[tuple[str, torch.Tensor]]
"""Names in the checkpoint, and tensors."""


def default_weight_loader(param: torch.Tensor, loaded_weight: torch.Tensor) -> None:
    """Copy a tensor into a parameter of the same size; a scalar fills a parameter of one element.

    Raises `WeightShapeError` (an `AssertionError`) for another size, and `WeightsError` for quantized values in a float
    parameter, or floats in a quantized one.
    """
    refuse_other_kind(param, loaded_weight, current_key() or "a weight")
    if param.numel() == 1 and loaded_weight.numel() == 1:
        param.data.fill_(loaded_weight.item())
        return
    if param.size() != loaded_weight.size():
        raise WeightShapeError(
            f"Weight: got shape {tuple(loaded_weight.shape)}, expected {tuple(param.shape)}, that of its parameter."
        )
    param.data.copy_(loaded_weight)


@dataclass
class WeightsMapper:
    """Renames checkpoint names by tables: first substrings anywhere in them, then prefixes, then suffixes.

    A new name of None drops the weight.
    """

    orig_to_new_substr: Mapping[str, str | None] = field(default_factory=dict)
    orig_to_new_prefix: Mapping[str, str | None] = field(default_factory=dict)
    orig_to_new_suffix: Mapping[str, str | None] = field(default_factory=dict)

    def map_name(self, name: str) -> str | None:
        """The new name, or None for a weight to drop."""
        for old, new in self.orig_to_new_substr.items():
            if old in name:
                if new is None:
                    return None
                name = name.replace(old, new, 1)
        for old, new in self.orig_to_new_prefix.items():
            if name.startswith(old):
                if new is None:
                    return None
                name = new + name[len(old) :]
        for old, new in self.orig_to_new_suffix.items():
            if name.endswith(old):
                if new is None:
                    return None
                name = name[: len(name) - len(old)] + new
        return name

    def apply(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights under their new names, without those to drop."""
        for name, tensor in weights:
            new_name = self.map_name(name)
            if new_name is None:
                ignore_weight(tensor)
            else:
                yield new_name, tensor


class AutoWeightsLoader:
    """Loads a model by descending through its modules along the names of the weights.

    A child module with its own `load_weights` method loads its weights itself, given their names relative to it; it is
    called more than once if they aren't adjacent in the checkpoint. All others go to their parameter's `weight_loader`,
    or to `default_weight_loader`. Buffers that a state dict contains are loaded likewise; a value for any other buffer
    is skipped, since the module computes it.

    `skip_prefixes`: names that are not loaded. `ignore_unexpected_prefixes`: names that may be missing in the
    module.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        skip_prefixes: Sequence[str] | None = None,
        ignore_unexpected_prefixes: Sequence[str] | None = None,
    ) -> None:
        self.module = module
        self.skip_prefixes = tuple(skip_prefixes or ())
        self.ignore_unexpected_prefixes = tuple(ignore_unexpected_prefixes or ())

    def load_weights(self, weights: Weights, *, mapper: WeightsMapper | None = None) -> set[str]:
        """Load all weights; returns the names of the parameters (and buffers) that were filled.

        Raises `WeightsError` (a `ValueError`) for a name that the module doesn't have.
        """
        if mapper is not None:
            weights = mapper.apply(weights)
        return set(self._load_module("", self.module, weights))

    def _load_module(self, prefix: str, module: nn.Module, weights: Weights) -> Iterator[str]:
        if isinstance(module, PPMissingLayer):
            return
        if module is not self.module:
            load_weights = getattr(module, "load_weights", None)
            if callable(load_weights):
                loaded = load_weights(weights)
                yield from (_join(prefix, name) for name in loaded or ())
                return
        children = dict(module.named_children())
        parameters = dict(module.named_parameters(recurse=False))
        buffers = dict(module.named_buffers(recurse=False))
        for child, group in groupby(weights, key=lambda item: item[0].partition(".")[0]):
            name = _join(prefix, child)
            rest = ((full.partition(".")[2], tensor) for full, tensor in group)
            if self._is_skipped(name):
                _ignore(rest)
                continue
            if child in children:
                yield from self._load_module(name, children[child], self._without_skipped(name, rest))
            elif child in parameters:
                yield from self._load_tensor(name, parameters[child], rest)
            elif child in buffers:
                if child in module._non_persistent_buffers_set:  # noqa: SLF001  torch says it nowhere else
                    _ignore(rest)
                else:
                    yield from self._load_tensor(name, buffers[child], rest)
            elif self._is_ignored(name):
                _ignore(rest)
            else:
                self._refuse(name, rest, module)

    def _load_tensor(self, name: str, target: torch.Tensor, weights: Weights) -> Iterator[str]:
        for rest, tensor in weights:
            if rest:
                raise WeightsError(
                    f"Weight {_join(name, rest)!r}: {name!r} is a single tensor in the model. "
                    f"Rename the weight with a WeightsMapper."
                )
            loader = getattr(target, "weight_loader", default_weight_loader)
            try:
                loader(target, tensor)
            except WeightShapeError as exc:
                raise WeightShapeError(f"{name}: {exc}") from exc
            yield name

    def _refuse(self, name: str, weights: Weights, module: nn.Module) -> None:
        """Raise for weights that the module doesn't have, unless all of them are to be ignored."""
        for rest, tensor in weights:
            full = _join(name, rest)
            if self._is_skipped(full) or self._is_ignored(full):
                ignore_weight(tensor)
            else:
                raise WeightsError(
                    f"There is no module or parameter named {full!r} in {type(self.module).__name__} "
                    f"({type(module).__name__} has none called {name.rpartition('.')[2]!r}). "
                    f"Rename it with a WeightsMapper, or list it under skip_prefixes."
                )

    def _without_skipped(self, name: str, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        for rest, tensor in weights:
            if self._is_skipped(_join(name, rest)):
                ignore_weight(tensor)
            else:
                yield rest, tensor

    def _is_skipped(self, name: str) -> bool:
        return name.startswith(self.skip_prefixes) if self.skip_prefixes else False

    def _is_ignored(self, name: str) -> bool:
        return name.startswith(self.ignore_unexpected_prefixes) if self.ignore_unexpected_prefixes else False


def _ignore(weights: Weights) -> None:
    for _, tensor in weights:
        ignore_weight(tensor)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name
