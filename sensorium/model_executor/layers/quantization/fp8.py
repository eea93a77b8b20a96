"""Weights in 8-bit floats: rounded at load, or as checkpoints store them; see `sensorium.kernels.fp8_linear`.

On a device that multiplies 8-bit floats, inputs are quantized row by row. Elsewhere weights are dequantized to the
model's dtype once, at load: results are right, at the speed and the memory of float weights. Weights with a scale per
block are always dequantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from sensorium.errors import ModelError
from sensorium.kernels import FP8, Fp8Weight, dequantize_fp8, fp8_linear, fp8_refusal, quantize_fp8_rows
from sensorium.model_executor.layers.parameters import Axes
from sensorium.model_executor.layers.quantization.base_config import LinearMethod, QuantizationConfig
from sensorium.model_executor.layers.quantization.unquantized import FLOAT, FloatMethod, lay_out
from sensorium.model_executor.weight_tracking import PLAIN_FLOATS

if TYPE_CHECKING:
    from sensorium.model_executor.layers.quantization.layer import WeightedLayer


@dataclass(frozen=True, slots=True)
class ScaleLayout:
    """Which weights share a scale: a whole tensor of the checkpoint, an output channel, or a block of channels."""

    block_size: tuple[int, int] | None = None
    """Output and input channels of a block."""
    per_channel: bool = False
    has_input_scale: bool = False
    """Whether the checkpoint also fixes the scale of inputs, one for each of its tensors (static activation scales)."""


class Fp8Method(FloatMethod):
    """Loads a float weight and rounds it to 8-bit floats, with a scale for each output channel."""

    name = "fp8"

    def after_loading(self, layer: WeightedLayer) -> None:
        """Quantize the weight, and free the float one."""
        hold(layer, *quantize_fp8_rows(layer.weight.detach()))

    def apply(self, layer: WeightedLayer, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See `LinearMethod`."""
        return fp8_linear(x, layer.packed, bias)


class StoredFp8Method(LinearMethod):
    """A weight that the checkpoint has in 8-bit floats, with its scales.

    A layer whose weight the checkpoint has in float becomes a float layer. The config's list of layers that aren't
    quantized is not read: it has the checkpoint's names, which are not always this model's.
    """

    name = "fp8"

    def __init__(self, layout: ScaleLayout) -> None:
        self._layout = layout

    def create_weights(self, layer: WeightedLayer) -> None:
        """The weight, its scales, and static scales of inputs if there are any."""
        layer.add_parameter("weight", layer.output_size, layer.input_size, dtype=FP8, axes=Axes(input=1))
        per_tensor = Axes(output_block=None)
        if self._layout.block_size is not None:
            outputs, inputs = self._layout.block_size
            axes = Axes(input=1, output_block=outputs, input_block=inputs)
            shape = sum(axes.entries(size) for size in layer.output_sizes), -(-layer.input_size // inputs)
            layer.add_parameter("weight_scale", *shape, dtype=torch.float32, axes=axes)
        elif self._layout.per_channel:
            layer.add_parameter("weight_scale", layer.output_size, 1, dtype=torch.float32, axes=Axes())
        else:
            layer.add_parameter("weight_scale", len(layer.output_sizes), dtype=torch.float32, axes=per_tensor)
        if self._layout.has_input_scale:
            layer.add_parameter("input_scale", len(layer.output_sizes), dtype=torch.float32, axes=per_tensor)

    def before_loading(self, layer: WeightedLayer, name: str, loaded: torch.Tensor) -> None:
        """If the weight comes in float, make the layer a float layer."""
        if name == "weight" and loaded.dtype in PLAIN_FLOATS:
            layer.start_over(FLOAT)

    def after_loading(self, layer: WeightedLayer) -> None:
        """Convert the scales to the kernel's layout, or the weight to the model's dtype."""
        # The parts of a fused layer share one input, which takes the largest of their input scales.
        input_scale = layer.get_parameter("input_scale").max() if self._layout.has_input_scale else None
        values, scales = layer.weight.detach(), self.scales_of(layer)
        layer.drop_parameters()
        layer.weight = nn.Parameter(values, requires_grad=False)
        hold(layer, values, scales, input_scale)

    def float_weight(self, layer: WeightedLayer) -> torch.Tensor:
        """See `LinearMethod`."""
        return dequantize_fp8(layer.weight.detach(), self.scales_of(layer), layer.params_dtype)

    def scales_of(self, layer: WeightedLayer) -> torch.Tensor:
        """The scales `(output_size, 1)`, or `(output_size, input_size)` for scales per block."""
        stored = layer.get_parameter("weight_scale").detach()
        if self._layout.per_channel:
            return stored
        sizes = layer.output_sizes
        if self._layout.block_size is None:
            return stored.repeat_interleave(torch.tensor(sizes, device=stored.device)).unsqueeze(1)
        outputs, inputs = self._layout.block_size
        parts = torch.split(stored, [-(-size // outputs) for size in sizes])
        rows = [part.repeat_interleave(outputs, 0)[:size] for part, size in zip(parts, sizes, strict=True)]
        return torch.cat(rows).repeat_interleave(inputs, 1)[:, : layer.input_size]

    def apply(self, layer: WeightedLayer, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See `LinearMethod`."""
        return fp8_linear(x, layer.packed, bias)


def hold(
    layer: WeightedLayer, values: torch.Tensor, scales: torch.Tensor, input_scale: torch.Tensor | None = None
) -> None:
    """Let a layer hold a weight in 8-bit floats if its device multiplies these, else in the model's dtype."""
    if scales.shape[1] != 1 or fp8_refusal(values.device) is not None:
        lay_out(layer, dequantize_fp8(values, scales, layer.params_dtype))
        return
    weight = layer.packed = Fp8Weight(values, scales, layer.params_dtype, input_scale)
    layer.give_up_weight()
    for name, tensor in weight.tensors().items():
        layer.register_buffer(name, tensor, persistent=False)


@dataclass(frozen=True, slots=True)
class Fp8Config(QuantizationConfig):
    """Weights in 8-bit floats: quantized at load, or from checkpoints of `transformers` (`FineGrainedFP8Config`),
    DeepSeek and AutoFP8."""

    name = "fp8"
    reads_checkpoints = True
    layout: ScaleLayout | None = None
    """The checkpoint's layout; None if weights are quantized at load."""

    @classmethod
    def at_load(cls) -> Self:
        """See `QuantizationConfig`."""
        return cls()

    @classmethod
    def from_checkpoint(cls, settings: Mapping[str, Any]) -> Self:
        """See `QuantizationConfig`."""
        scheme, number_format = settings.get("activation_scheme", "dynamic"), settings.get("fmt", "e4m3")
        block = settings.get("weight_block_size")
        if scheme not in ("dynamic", "static") or number_format not in ("e4m3", "float8_e4m3fn"):
            raise ModelError(
                f"quantization_config in config.json: got fp8 of format {number_format!r} and activation_scheme "
                f"{scheme!r}, expected 'e4m3' and 'dynamic' or 'static'. Use the checkpoint that it was made from."
            )
        return cls(ScaleLayout(block_size(block) if block else None, has_input_scale=scheme == "static"))

    def method_for(self, prefix: str, layer: WeightedLayer) -> LinearMethod:
        """See `QuantizationConfig`."""
        return Fp8Method() if self.layout is None else StoredFp8Method(self.layout)

    def checkpoint_name(self, name: str) -> str:
        """Maps checkpoints' names of scales to the layer's. What they call the inverse scale is the factor on quantized
        values, too."""
        return name.replace(".weight_scale_inv", ".weight_scale").replace(".activation_scale", ".input_scale")


def block_size(value: Any) -> tuple[int, int]:
    """A block's output and input channels, as a config has them. Raises `ModelError`."""
    numbers = tuple(value) if isinstance(value, list | tuple) else ()
    if len(numbers) != 2 or not all(isinstance(each, int) and each > 0 for each in numbers):
        raise ModelError(
            f"block size of the weights' scales in config.json: got {value!r}, expected two numbers of channels, as in "
            "[128, 128]. Correct quantization_config."
        )
    return numbers[0], numbers[1]
