"""Matrix multiplication in int8: weights are quantized once, at load, and inputs row by row at each call.

Both sides are symmetric: a row `r` becomes integers `round(r / scale)` from -127 to 127, with one float32 scale, its
largest magnitude over 127. Integer sums are exact in any order, so a row's result depends on that row alone, and all
kernels and the twin return the same bits.
"""

from __future__ import annotations

import torch

from sensorium.errors import ModelError
from sensorium.kernels.linear import arena
from sensorium.kernels.native import DTYPE_CODES, native_for, native_library, rows_of

MAX_QUANTIZED_INPUTS = 1 << 17
"""Most channels that a quantized layer may sum over: 127 * 127 times this is just below 2^31."""
SMALLEST_MAGNITUDE = 2.0**-100
"""A row whose values are all smaller becomes zeros."""


class QuantizedWeight:
    """A linear layer's weight `(out_features, in_features)` as int8, for inputs and outputs of `dtype`.

    Either `panels` holds the native layout, scales included, or `integers` `(out_features, in_features)` and `scales`
    `(out_features,)` the plain form.
    """

    __slots__ = ("dtype", "in_features", "integers", "out_features", "panels", "scales")

    def __init__(
        self,
        out_features: int,
        in_features: int,
        dtype: torch.dtype,
        *,
        panels: torch.Tensor | None = None,
        integers: torch.Tensor | None = None,
        scales: torch.Tensor | None = None,
    ) -> None:
        self.out_features = out_features
        self.in_features = in_features
        self.dtype = dtype
        self.panels = panels
        self.integers = integers
        self.scales = scales

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its tensors, by name."""
        held = {"quantized_weight": self.integers if self.panels is None else self.panels, "scales": self.scales}
        return {name: tensor for name, tensor in held.items() if tensor is not None}


def quantize(weight: torch.Tensor) -> QuantizedWeight:
    """Quantize a weight `(out_features, in_features)`, whose values are no longer needed afterwards.

    Raises:
        ModelError: It has more than `MAX_QUANTIZED_INPUTS` input channels.
    """
    weight = weight.detach()
    out_features, in_features = weight.shape
    if in_features > MAX_QUANTIZED_INPUTS:
        raise ModelError(
            f"input channels of a layer in int8: got {in_features}, expected at most {MAX_QUANTIZED_INPUTS}. "
            "Keep this layer in float."
        )
    native = native_for(weight)
    if native is None:
        integers, scales = quantize_rows(weight)
        return QuantizedWeight(out_features, in_features, weight.dtype, integers=integers, scales=scales)
    rows, code = rows_of(weight), DTYPE_CODES[weight.dtype]
    panels = arena.take(native.quantized_bytes(out_features, in_features))
    native.quantize(
        *(panels.data_ptr(), rows.data_ptr(), out_features, in_features),
        *(rows.stride(0) * rows.element_size(), code, torch.get_num_threads()),
    )
    return QuantizedWeight(out_features, in_features, weight.dtype, panels=panels)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row of `x` `(rows, n)` as int8 `(rows, n)` and its float32 scale `(rows,)`.

    A row with an infinity or NaN becomes zeros with the scale NaN.
    """
    values = x.float()
    largest = values.abs().amax(-1) if values.shape[-1] else values.new_zeros(len(values))
    finite = largest.isfinite()
    used = largest.clamp_min(SMALLEST_MAGNITUDE)
    steps = torch.full_like(used, 127.0)  # a tensor: a number would be multiplied by its reciprocal, rounding twice
    scaled = (values * (steps / used).unsqueeze(-1)).masked_fill(~finite.unsqueeze(-1), 0)
    return scaled.round().to(torch.int8), torch.where(finite, used / steps, torch.nan)


EXACT_COLUMNS = 1024
"""127 * 127 times this is below 2^24: float32 sums over this many columns are exact in any order."""


def quantized_linear_reference(
    x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`x @ weight.T + bias` for `x` `(..., in_features)`, which is quantized row by row.

    The sums are int32; they are scaled, and the bias added, in float32, and rounded once to the dtype.

    Args:
        x: `(..., in_features)` of the weight's dtype.
        weight: From `quantize`.
        bias: `(out_features,)` of the weight's dtype.

    Returns:
        `(..., out_features)`.

    Raises:
        ModelError: The shape, dtype or device of `x` doesn't match the weight.
    """
    assert weight.integers is not None
    assert weight.scales is not None
    rows, row_scales = quantize_rows(x.reshape(-1, weight.in_features))
    sums = torch.zeros(len(rows), weight.out_features, dtype=torch.int32)
    for begin in range(0, weight.in_features, EXACT_COLUMNS):
        columns = slice(begin, begin + EXACT_COLUMNS)
        sums += (rows[:, columns].float() @ weight.integers[:, columns].float().T).to(torch.int32)
    result = sums.float() * (row_scales.unsqueeze(-1) * weight.scales)
    if bias is not None:
        result = result + bias.float()
    return result.to(weight.dtype).reshape(*x.shape[:-1], weight.out_features)


def quantized_linear(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See `quantized_linear_reference`."""
    if x.dtype != weight.dtype or x.shape[-1] != weight.in_features or not x.is_cpu:
        raise ModelError(
            f"input of a linear layer: got {x.dtype} of shape {tuple(x.shape)} on {x.device}, expected "
            f"{weight.dtype} of shape (..., {weight.in_features}) on cpu. Convert it before the layer."
        )
    if weight.panels is None:
        return quantized_linear_reference(x, weight, bias)
    if bias is not None and (bias.dtype != weight.dtype or not bias.is_contiguous()):
        bias = bias.to(weight.dtype).contiguous()
    native = native_library()
    assert native is not None
    rows = rows_of(x)
    out = x.new_empty((*x.shape[:-1], weight.out_features))
    native.quantized_linear(
        *(out.data_ptr(), rows.data_ptr(), weight.panels.data_ptr()),
        *(0 if bias is None else bias.data_ptr(), rows.shape[0], weight.out_features, weight.in_features),
        *(rows.stride(0) * rows.element_size(), DTYPE_CODES[x.dtype], torch.get_num_threads()),
    )
    return out
