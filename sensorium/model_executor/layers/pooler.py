"""Pooling: from hidden states to vectors or scores of labels, for models that don't generate.

A request's rows arrive chunk by chunk, in order. A `Pool` keeps only what its result needs.

Sources: `sentence_transformers.models.Pooling`, `Dense` and `Normalize`; Hugging Face's text classification pipelines.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch.nn import functional as F

from sensorium.checkpoint import read_json, weight_files
from sensorium.config import Activation, PoolingType
from sensorium.errors import ModelError, WeightsError


class Pool(Protocol):
    """Collects a request's rows and pools them."""

    def add(self, rows: torch.Tensor) -> None:
        """Take in a chunk's rows `(num_rows, hidden_size)`."""

    def finish(self) -> torch.Tensor:
        """The pooled vector `(hidden_size,)` float32, or all rows."""


class AllRows:
    """Keeps every row."""

    def __init__(self) -> None:
        self._parts: list[torch.Tensor] = []

    def add(self, rows: torch.Tensor) -> None:
        """See `Pool`."""
        self._parts.append(rows.clone())

    def finish(self) -> torch.Tensor:
        """All rows `(num_tokens, hidden_size)`, in their own type."""
        return self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts)


class LastRow:
    """Keeps the last row."""

    def __init__(self) -> None:
        self._row: torch.Tensor | None = None

    def add(self, rows: torch.Tensor) -> None:
        """See `Pool`."""
        self._row = rows[-1].float()

    def finish(self) -> torch.Tensor:
        """See `Pool`."""
        assert self._row is not None
        return self._row


class FirstRow(LastRow):
    """Keeps the first row, which is the classification token's."""

    def add(self, rows: torch.Tensor) -> None:
        """See `Pool`."""
        if self._row is None:
            self._row = rows[0].float()


class LargestValues(LastRow):
    """Keeps the largest value of each channel."""

    def add(self, rows: torch.Tensor) -> None:
        """See `Pool`."""
        largest = rows.float().amax(0)
        self._row = largest if self._row is None else torch.maximum(self._row, largest)


class WeightedSum:
    """Divides the weighted sum of rows by the sum of their weights.

    Args:
        by_position: The i-th row, counted from 1, has the weight i; else 1.
        root: Divide by the square root of the weights' sum.
    """

    def __init__(self, *, by_position: bool = False, root: bool = False) -> None:
        self._by_position, self._root = by_position, root
        self._sum: torch.Tensor | None = None
        self._num_rows = 0

    def add(self, rows: torch.Tensor) -> None:
        """See `Pool`."""
        first, self._num_rows = self._num_rows + 1, self._num_rows + len(rows)
        rows = rows.float()
        if self._by_position:
            rows = rows * torch.arange(first, self._num_rows + 1, device=rows.device)[:, None]
        total = rows.sum(0)
        self._sum = total if self._sum is None else self._sum + total

    def finish(self) -> torch.Tensor:
        """See `Pool`."""
        assert self._sum is not None
        weight = self._num_rows * (self._num_rows + 1) / 2 if self._by_position else self._num_rows
        return self._sum / (weight**0.5 if self._root else weight)


def new_pool(kind: PoolingType) -> Pool:
    """A new pool of one kind."""
    match kind:
        case "cls":
            return FirstRow()
        case "max":
            return LargestValues()
        case "mean":
            return WeightedSum()
        case "mean_sqrt_len":
            return WeightedSum(root=True)
        case "weighted_mean":
            return WeightedSum(by_position=True)
        case _:
            return LastRow()


def activated(scores: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Probabilities `(..., num_labels)` of raw scores."""
    match activation:
        case "softmax":
            return scores.softmax(-1)
        case "sigmoid":
            return scores.sigmoid()
        case _:
            return scores


_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Identity": lambda vectors: vectors,
    "Tanh": torch.tanh,
    "ReLU": F.relu,
    "GELU": F.gelu,
    "Sigmoid": torch.sigmoid,
}


class Projection:
    """A linear layer with an activation after pooling: sentence-transformers' `Dense`.

    Computed in float32, as pooled vectors are.

    Args:
        folder: The module's folder in the checkpoint.
        device: The device of the vectors.

    Raises:
        ModelError: Its settings aren't supported.
        WeightsError: Its weights are missing.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        from safetensors.torch import load_file

        written = read_json(folder / "config.json")
        name = str(written.get("activation_function", "Tanh")).rpartition(".")[2]
        if name not in _FUNCTIONS:
            raise ModelError(
                f"activation_function in {folder.name}/config.json: got {name!r:.60}, expected one of "
                f"{sorted(_FUNCTIONS)}. Correct it."
            )
        if written.get("use_residual"):
            raise ModelError(f"use_residual in {folder.name}/config.json: got true, expected false. Correct it.")
        tensors = {key: value for file in weight_files(folder) for key, value in load_file(file).items()}
        if "linear.weight" not in tensors:
            raise WeightsError(
                f"weights in {folder.name}: got {sorted(tensors)[:5]}, expected linear.weight. Download the "
                "checkpoint again."
            )
        self._function = _FUNCTIONS[name]
        self._weight = tensors["linear.weight"].float().to(device)
        bias = tensors.get("linear.bias")
        self._bias = None if bias is None else bias.float().to(device)

    def __call__(self, vectors: torch.Tensor) -> torch.Tensor:
        """`(..., in)` to `(..., out)`, float32."""
        return self._function(F.linear(vectors.float(), self._weight, self._bias))
