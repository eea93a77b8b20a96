"""Parameters of layers: created empty, then filled from a checkpoint, whole or part by part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from sensorium.errors import WeightsError
from sensorium.model_executor.weight_tracking import refuse_other_kind


@dataclass(frozen=True, slots=True)
class Axes:
    """Which channels of a layer a parameter's entries stand for.

    The parts of a fused layer and the shares of ranks are ranges of channels; this says which axis of a parameter such
    a range lies on, and how many channels an entry there stands for.

        weight           (outputs, inputs)              Axes(input=1)
        bias, or a scale per output channel             Axes()
        a scale per block of 128 x 128                  Axes(input=1, output_block=128, input_block=128)
        a scale per checkpoint tensor                   Axes(output_block=None), one entry for each part of the layer
        integers packed eight to a word, inputs first   Axes(output=1, input=0, input_block=8)
    """

    output: int = 0
    """The axis along the output channels."""
    input: int | None = None
    """The axis along the input channels, if there is one."""
    output_block: int | None = 1
    """Output channels that share an entry; None: all of a part."""
    input_block: int = 1
    """Input channels that share an entry."""

    def entries(self, num_outputs: int) -> int:
        """The number of entries for a part of so many output channels. A part begins with a new block."""
        return 1 if self.output_block is None else -(-num_outputs // self.output_block)


def new_parameter(
    *shape: int,
    dtype: torch.dtype | None = None,
    loader: Callable[..., None] | None = None,
    axes: Axes | None = None,
    name: str = "",
) -> nn.Parameter:
    """An unfilled parameter that a checkpoint fills through `loader` (by default a plain copy).

    Loaders read `axes` and `name` from the parameter, as `axes` and `param_name`. Loaders written for vLLM read
    `output_dim` and `input_dim`, the axes along output and input channels, and `packed_dim`, one whose entries hold
    several values.
    """
    parameter = nn.Parameter(torch.empty(shape, dtype=dtype or torch.get_default_dtype()), requires_grad=False)
    carried: dict[str, object] = {"weight_loader": loader, "axes": axes, "param_name": name or None}
    if axes is not None:
        packed = axes.input if axes.input_block > 1 and axes.output_block == 1 else None
        carried |= {"output_dim": axes.output, "input_dim": axes.input, "packed_dim": packed}
    parameter.__dict__.update({key: value for key, value in carried.items() if value is not None})
    return parameter


def copy_weight(target: torch.Tensor, loaded: torch.Tensor, what: str) -> None:
    """Copy a checkpoint's tensor into (a part of) a parameter; floats are converted to its dtype.

    Raises:
        WeightsError: The shapes differ, or one holds integers or 8-bit floats and the other doesn't; `what` names the
            parameter.
    """
    refuse_other_kind(target, loaded, what)
    if target.shape != loaded.shape:
        raise WeightsError(
            f"shape of {what}: got {tuple(loaded.shape)} from the checkpoint, expected "
            f"{tuple(target.shape)}. "
            "Check that config.json belongs to these weights."
        )
    target.copy_(loaded)


def without_memory(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter of the same shape and dtype on the meta device, for one whose values are held elsewhere."""
    return nn.Parameter(parameter.to("meta"), requires_grad=False)
