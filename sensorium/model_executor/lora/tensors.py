"""An adapter's tensors by the layer that each pair belongs to, checked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from sensorium.errors import WeightsError
from sensorium.lora import WEIGHTS_NAME, AdapterSettings
from sensorium.model_executor.model_loader.weight_utils import safetensors_weights
from sensorium.model_executor.weight_tracking import PLAIN_FLOATS

_KEY = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")


@dataclass(frozen=True, slots=True)
class Pair:
    """The two matrices of one layer of the Hugging Face model; their product is added to its weight."""

    down: torch.Tensor
    """`(rank, inputs)`"""
    up: torch.Tensor
    """`(outputs, rank)` in float32, scale included."""


def read_pairs(what: str, folder: Path, settings: AdapterSettings) -> Iterator[tuple[str, Pair]]:
    """The pairs of an adapter by the names of their layers in the Hugging Face model. `what` names the adapter.

    Raises:
        WeightsError: The file is damaged, or holds anything but pairs of finite floats that fit the settings.
    """
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in safetensors_weights([folder / WEIGHTS_NAME]):
        found = _KEY.fullmatch(key)
        if found is None:
            raise WeightsError(
                f"{what}: got the tensor {key!r:.160}, expected pairs of lora_A and lora_B of linear layers alone. "
                "Embeddings, biases, magnitudes and whole modules of an adapter aren't served; merge it into the model."
            )
        _check_values(what, key, tensor)
        sides.setdefault(found["layer"], {})[found["side"]] = tensor
    if not sides:
        raise WeightsError(f"{what}: got no tensor in {WEIGHTS_NAME}, expected at least one pair. Save it again.")
    for layer, pair in sides.items():
        yield layer, _paired(what, layer, pair, settings)


def _check_values(what: str, key: str, tensor: torch.Tensor) -> None:
    if tensor.dim() != 2 or tensor.dtype not in PLAIN_FLOATS:
        raise WeightsError(
            f"{what}: got {tensor.dtype} of shape {tuple(tensor.shape)} for {key!r:.160}, expected a matrix of floats. "
            "Adapters of linear layers are served, in floats of 16 bits or more."
        )
    if not tensor.isfinite().all():
        raise WeightsError(f"{what}: got NaN or infinity in {key!r:.160}, expected finite values. Train it again.")


def _paired(what: str, layer: str, sides: dict[str, torch.Tensor], settings: AdapterSettings) -> Pair:
    if len(sides) < 2:
        raise WeightsError(
            f"{what}: got only lora_{next(iter(sides))} of {layer!r:.160}, expected a pair. Save it again."
        )
    down, up, rank = sides["A"], sides["B"], settings.rank_of(layer)
    if (len(down), up.shape[1]) != (rank, rank):
        raise WeightsError(
            f"{what}: got ranks {len(down)} and {up.shape[1]} of {layer!r:.160}, expected {rank}, as its config says. "
            "Save it again, or correct r and rank_pattern."
        )
    return Pair(down, up.float() * settings.scale_of(layer))
