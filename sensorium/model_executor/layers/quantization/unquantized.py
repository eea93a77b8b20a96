"""Float weights: as they are, for torch and the kernels of a GPU, or laid out for the CPU's native kernels."""

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
        """Nothing to lay out, unless there are native kernels for such a weight."""
        if native_for(layer.weight) is not None:
            layer.continue_with(PACKED)
        else:
            layer.packed = layer.weight.detach()

    def apply(self, layer: WeightedLayer, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See `LinearMethod`."""
        return plain_linear(x, layer.packed, bias)


class PackedMethod(FloatMethod):
    """A weight in the layout of the native kernels. `layer.packed` is a `PackedWeight`."""

    name = "packed float"

    def after_loading(self, layer: WeightedLayer) -> None:
        """Give up the plain copy."""
        packed = layer.packed = pack(layer.weight)
        layer.give_up_weight()
        # As a buffer it counts among the model's tensors.
        layer.register_buffer("packed_weight", packed.panels, persistent=False)

    def apply(self, layer: WeightedLayer, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See `LinearMethod`."""
        return packed_linear(x, layer.packed, bias)


FLOAT = FloatMethod()
PACKED = PackedMethod()
