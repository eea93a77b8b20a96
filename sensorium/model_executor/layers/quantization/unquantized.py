"""Float weights: unchanged for torch and the GPU's kernels, or in the layout of the CPU's native kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sensorium.kernels import pack, packed_linear, plain_linear
from sensorium.kernels.native import native_for
from sensorium.model_executor.layers.parameters import Axes
from sensorium.model_executor.layers.quantization.base_config import LinearMethod

if TYPE_CHECKING:
    from sensorium.model_executor.layers.quantization.layer import WeightedLayer


class FloatMethod(LinearMethod):
    """A weight in the model's dtype. `layer.packed` is the weight itself."""

    name = "float"
    loads_float = True

    def create_weights(self, layer: WeightedLayer) -> None:
        """See `LinearMethod`."""
        layer.add_parameter("weight", layer.output_size, layer.input_size, axes=Axes(input=1))

    def after_loading(self, layer: WeightedLayer) -> None:
        """See `lay_out`."""
        lay_out(layer, layer.weight)

    def apply(self, layer: WeightedLayer, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See `LinearMethod`."""
        return plain_linear(x, layer.packed, bias)


class PackedMethod(FloatMethod):
    """A weight in the layout of the native kernels. `layer.packed` is a `PackedWeight`."""

    name = "packed float"

    def apply(self, layer: WeightedLayer, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See `LinearMethod`."""
        return packed_linear(x, layer.packed, bias)


FLOAT = FloatMethod()
PACKED = PackedMethod()


def lay_out(layer: WeightedLayer, weight: torch.Tensor) -> None:
    """Give a layer a float weight, its own or one computed from it, and the method for it. For
    `LinearMethod.after_loading`."""
    weight = weight.detach()
    if native_for(weight) is None:
        layer.method, layer.packed = FLOAT, weight
        if weight.data_ptr() == layer.weight.data_ptr():
            return
        held = weight
    else:
        packed = pack(weight)
        layer.method, layer.packed = PACKED, packed
        assert packed.panels is not None
        held = packed.panels
    layer.give_up_weight()
    # A buffer, so that it is one of the model's tensors.
    layer.register_buffer("packed_weight", held, persistent=False)
