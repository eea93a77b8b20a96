"""Weights in 4-bit floats with a power of two as the scale of each 32 inputs, which GPT-OSS's checkpoints use for
experts.

They are dequantized to the model's dtype once, at load, which is exact. Speed and memory are those of float weights.

Source: Open Compute Project, "Microscaling Formats (MX)" 1.0, section 5; `transformers` `integrations/mxfp4.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from sensorium.model_executor.layers.parameters import Axes
from sensorium.model_executor.layers.quantization.base_config import LinearMethod, QuantizationConfig
from sensorium.model_executor.layers.quantization.unquantized import FLOAT, lay_out
from sensorium.model_executor.weight_tracking import PLAIN_FLOATS

if TYPE_CHECKING:
    from sensorium.model_executor.layers.quantization.layer import WeightedLayer

BLOCK_SIZE = 32
"""Inputs that share a scale."""
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_EXPONENT_OF_ONE = 127


def dequantize_mxfp4(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`(outputs, inputs)` of `blocks` `(outputs, inputs / 32, 16)` uint8 and `scales` `(outputs, inputs / 32)` uint8.

    A byte has two values, the first in the lower four bits. A value is a sign bit, and below it the index of a
    magnitude.
    """
    values = torch.tensor([*_MAGNITUDES, *(-each for each in _MAGNITUDES)], dtype=dtype, device=blocks.device)
    indices = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(2)
    exponents = scales.to(torch.int32) - _EXPONENT_OF_ONE
    return torch.ldexp(values[indices.int()], exponents.unsqueeze(-1)).to(dtype).flatten(1)


class Mxfp4Method(LinearMethod):
    """A weight that the checkpoint has in blocks. A layer whose weight it has in float becomes a float layer."""

    name = "mxfp4"

    def create_weights(self, layer: WeightedLayer) -> None:
        """The blocks and their scales."""
        shape = layer.output_size, -(-layer.input_size // BLOCK_SIZE)
        axes = Axes(input=1, input_block=BLOCK_SIZE)
        layer.add_parameter("weight", *shape, BLOCK_SIZE // 2, dtype=torch.uint8, axes=axes)
        layer.add_parameter("weight_scale", *shape, dtype=torch.uint8, axes=axes)

    def before_loading(self, layer: WeightedLayer, name: str, loaded: torch.Tensor) -> None:
        """If the weight comes in float, make the layer a float layer."""
        if name == "weight" and loaded.dtype in PLAIN_FLOATS:
            layer.start_over(FLOAT)

    def after_loading(self, layer: WeightedLayer) -> None:
        """Dequantize the weight to the model's dtype."""
        weight = self.float_weight(layer)
        layer.drop_parameters()
        layer.weight = nn.Parameter(weight, requires_grad=False)
        lay_out(layer, weight)

    def float_weight(self, layer: WeightedLayer) -> torch.Tensor:
        """See `LinearMethod`."""
        scales = layer.get_parameter("weight_scale").detach()
        return dequantize_mxfp4(layer.weight.detach(), scales, layer.params_dtype)

    def apply(self, layer: WeightedLayer, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Never called: `after_loading` gives the layer a method for float weights."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Mxfp4Config(QuantizationConfig):
    """Experts in 4-bit floats, everything else in float."""

    name = "mxfp4"
    reads_checkpoints = True

    @classmethod
    def from_checkpoint(cls, settings: Mapping[str, Any]) -> Self:  # noqa: ARG003 -- there is one layout
        """See `QuantizationConfig`."""
        return cls()

    def method_for(self, prefix: str, layer: WeightedLayer) -> LinearMethod:
        """See `QuantizationConfig`."""
        return Mxfp4Method()

    def checkpoint_name(self, name: str) -> str:
        """Checkpoints name the tensors by the endings `_blocks` and `_scales`."""
        for ending, parameter in (("_blocks", ".weight"), ("_scales", ".weight_scale")):
            if name.endswith(ending):
                return name.removesuffix(ending) + parameter
        return name
