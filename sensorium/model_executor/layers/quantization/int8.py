"""Weights quantized to int8 at load, inputs quantized row by row at run time; see
`sensorium.kernels.quantized_linear`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch

from sensorium.kernels import quantize, quantized_linear
from sensorium.kernels.quantized_linear import MAX_QUANTIZED_INPUTS
from sensorium.model_executor.layers.quantization.base_config import LinearMethod, QuantizationConfig
from sensorium.model_executor.layers.quantization.unquantized import FLOAT, FloatMethod

if TYPE_CHECKING:
    from sensorium.model_executor.layers.quantization.layer import WeightedLayer


class Int8Method(FloatMethod):
    """Loads a float weight and turns it into integers. `layer.packed` is a `QuantizedWeight`."""

    name = "int8"

    def after_loading(self, layer: WeightedLayer) -> None:
        """Quantize the weight, and free the float one."""
        quantized = layer.packed = quantize(layer.weight)
        layer.give_up_weight()
        for name, tensor in quantized.tensors().items():
            layer.register_buffer(name, tensor, persistent=False)

    def apply(self, layer: WeightedLayer, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See `LinearMethod`."""
        return quantized_linear(x, layer.packed, bias)


INT8 = Int8Method()


@dataclass(frozen=True, slots=True)
class Int8Config(QuantizationConfig):
    """int8 in every layer with few enough input channels for exact integer sums."""

    name = "int8"
    device_types = ("cpu",)

    @classmethod
    def at_load(cls) -> Self:
        """See `QuantizationConfig`."""
        return cls()

    def method_for(self, prefix: str, layer: WeightedLayer) -> LinearMethod:
        """See `QuantizationConfig`."""
        return INT8 if layer.input_size <= MAX_QUANTIZED_INPUTS else FLOAT
