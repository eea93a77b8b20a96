"""What a layer with adapters computes: its own product, and for each row what the row's adapter adds."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sensorium.kernels import PackedWeight, packed_linear
from sensorium.model_executor.adapter_rows import AdapterRows, current_adapters
from sensorium.model_executor.layers.quantization import LinearMethod
from sensorium.model_executor.layers.quantization.layer import WeightedLayer


@dataclass(frozen=True, slots=True)
class UpProjection:
    """The second matrix of an adapter in one part of a layer, scale included."""

    weight: PackedWeight
    """`(channels of the part, rank)`"""
    first_channel: int
    """Where the part begins in the layer's output."""
    first_rank: int
    """Where its rows begin in the first matrix's output."""

    def add(self, out: torch.Tensor, thin: torch.Tensor) -> None:
        """Add the product to the part's channels of `out` `(num_rows, outputs)`."""
        rows = thin.narrow(1, self.first_rank, self.weight.in_features)
        out.narrow(1, self.first_channel, self.weight.out_features).add_(packed_linear(rows, self.weight))


@dataclass(frozen=True, slots=True)
class LayerDelta:
    """What one adapter adds to one layer. The first matrices of all parts are one, so that they cost one product."""

    down: PackedWeight
    """`(ranks of all parts, inputs)`"""
    ups: tuple[UpProjection, ...]

    @property
    def num_bytes(self) -> int:
        """Memory of all its matrices."""
        return sum(_num_bytes(weight) for weight in (self.down, *(up.weight for up in self.ups)))

    def add(self, out: torch.Tensor, x: torch.Tensor, rows: AdapterRows, adapter_id: int) -> None:
        """Add it to the rows of `out` `(num_rows, outputs)` that are this adapter's.

        The other rows take part and get zeros: picking rows would have the host wait for a device that knows them, and
        a thin product costs little. Every row's result is its own, whoever stands beside it.
        """
        thin = packed_linear(x, self.down).masked_fill_(rows.others(adapter_id), 0)
        for up in self.ups:
            up.add(out, thin)


class LoRAMethod(LinearMethod):
    """Multiplies by the layer's own method, and adds adapters' products. A pass without adapters costs one question.

    Args:
        inner: The layer's own method.
        deltas: What is added, by adapter id.
    """

    name = "its own method and adapters"

    def __init__(self, inner: LinearMethod, deltas: dict[int, LayerDelta]) -> None:
        self._inner = inner
        self._deltas = deltas
        self.has_run = False
        """Whether rows with an adapter have come by."""

    @property
    def num_bytes(self) -> int:
        """Memory of all adapters' matrices."""
        return sum(delta.num_bytes for delta in self._deltas.values())

    def create_weights(self, layer: WeightedLayer) -> None:
        """See `LinearMethod`."""
        self._inner.create_weights(layer)

    def after_loading(self, layer: WeightedLayer) -> None:
        """See `LinearMethod`."""
        self._inner.after_loading(layer)

    def apply(self, layer: WeightedLayer, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See `LinearMethod`."""
        out = self._inner.apply(layer, x, bias)
        rows = current_adapters()
        if rows is None:
            return out
        self.has_run = True
        flat_x, flat_out = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
        for adapter_id in rows.present:
            delta = self._deltas.get(adapter_id)
            if delta is not None:
                delta.add(flat_out, flat_x, rows, adapter_id)
        return out


def _num_bytes(weight: PackedWeight) -> int:
    held = weight.plain if weight.panels is None else weight.panels
    assert held is not None
    return held.nbytes
