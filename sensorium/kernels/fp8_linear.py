"""Matrix multiplication in 8-bit floats (e4m3: 4 bits of exponent, 3 of mantissa; largest value 448).

Each row of the weight and each row of the input has a float32 scale: its largest magnitude over 448, unless the
checkpoint has a static one for inputs. The device's own instructions sum products in float32 (`torch._scaled_mm`).

Source: Micikevicius et al. 2022, "FP8 formats for deep learning".
"""

from __future__ import annotations

from functools import cache

import torch
from torch.nn import functional as F

from sensorium.errors import ModelError
from sensorium.kernels.gpu import has_triton

_scaled_mm = torch._scaled_mm  # noqa: SLF001 -- every torch that is supported has it; its public twin came late
FP8 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST_MAGNITUDE = 2.0**-100
"""A row whose values are all smaller becomes zeros."""
ALIGNMENT = 16
"""Input and output channels of a product must be multiples of this many bytes."""
MANY_ROWS = 256
"""From so many rows on, a product with scales per row is faster than one whose sums are scaled afterwards. A layer of
7B on an H200, in microseconds: 134 against 83 at 16 rows, 138 both ways at 256, 789 against 926 at 2048."""
FIRST_CAPABILITY = (8, 9)
"""The first generation of NVIDIA's GPUs that multiplies 8-bit floats (Ada; then Hopper)."""


class Fp8Weight:
    """A linear layer's weight in 8-bit floats, for inputs and outputs of `dtype`.

    Args:
        values: `(out_features, in_features)` of `FP8`.
        scales: `(out_features, 1)` float32.
        dtype: Of inputs and outputs.
        input_scale: One float32 element, the static scale of all inputs; None: each row has its own.
    """

    __slots__ = ("dtype", "in_features", "input_scale", "out_features", "scales", "values")

    def __init__(
        self, values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, input_scale: torch.Tensor | None = None
    ) -> None:
        self.out_features, self.in_features = values.shape
        self.dtype = dtype
        self.input_scale = input_scale
        pad = [-size % ALIGNMENT for size in values.shape]
        # Padded as bytes, since 8-bit floats can't be padded on every device; the byte 0 is the value 0.
        self.values = F.pad(values.view(torch.uint8), (0, pad[1], 0, pad[0])).view(FP8)
        """`(out_features, in_features)`, each rounded up to `ALIGNMENT`, with zeros."""
        self.scales = F.pad(scales.float().reshape(1, -1), (0, pad[0]), value=1.0)
        """`(1, out_features)`, rounded up."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """What it holds, by name."""
        return {"fp8_values": self.values, "fp8_scales": self.scales}


def fp8_refusal(device: torch.device) -> str | None:
    """Why a device doesn't multiply 8-bit floats; None if it does."""
    if device.type != "cuda":
        return f"a {device.type} has no 8-bit floats"
    capability = torch.cuda.get_device_capability(device)
    if capability < FIRST_CAPABILITY:
        return f"a GPU of compute capability {capability[0]}.{capability[1]} has no 8-bit floats"
    return None


def quantize_fp8_rows(x: torch.Tensor, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row of `x` `(rows, n)` as `FP8` `(rows, n)` and its float32 scale `(rows, 1)`.

    A row with an infinity or NaN becomes zeros with the scale NaN.

    Args:
        x: The rows.
        scale: One element: the scale of all rows, which saturates larger values.
    """
    values = x.float()
    largest = values.abs().amax(-1, keepdim=True) if x.shape[-1] else values.new_zeros((len(x), 1))
    finite = largest.isfinite()
    used = largest.clamp_min(SMALLEST_MAGNITUDE) / LARGEST if scale is None else scale.float().expand_as(largest)
    # Multiplies with the reciprocal: on a GPU, dividing each value takes longer than reading it.
    scaled = (values * (1 / used)).masked_fill(~finite, 0).clamp(-LARGEST, LARGEST)
    return scaled.to(FP8), torch.where(finite, used, torch.nan)


def dequantize_fp8(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`values * scales` in float32, rounded once to `dtype`; `scales` of the same number of axes, or 1 along some."""
    return (values.float() * scales.float()).to(dtype)


def fp8_linear_reference(x: torch.Tensor, weight: Fp8Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x @ weight.T + bias` for `x` `(..., in_features)`, which is quantized row by row.

    Args:
        x: `(..., in_features)` of the weight's dtype.
        weight: In 8-bit floats.
        bias: `(out_features,)` of the weight's dtype.

    Returns:
        `(..., out_features)`.

    Raises:
        ModelError: The shape, dtype or device of `x` doesn't match the weight.
    """
    rows, scales = quantize_fp8_rows(x.reshape(-1, weight.in_features), weight.input_scale)
    kept = weight.values[: weight.out_features, : weight.in_features]
    result = (rows.float() @ kept.float().T) * scales * weight.scales[:, : weight.out_features]
    if bias is not None:
        result = result + bias.float()
    return result.to(weight.dtype).reshape(*x.shape[:-1], weight.out_features)


def fp8_linear(x: torch.Tensor, weight: Fp8Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See `fp8_linear_reference`."""
    if x.dtype != weight.dtype or x.shape[-1] != weight.in_features or x.device != weight.values.device:
        raise ModelError(
            f"input of a linear layer: got {x.dtype} of shape {tuple(x.shape)} on {x.device}, expected "
            f"{weight.dtype} of shape (..., {weight.in_features}) on {weight.values.device}. Convert it first."
        )
    rows = x.reshape(-1, weight.in_features)
    if not len(rows):
        return x.new_empty((*x.shape[:-1], weight.out_features))
    values, scales = _padded_rows(rows, weight)
    if x.dtype == torch.bfloat16 and len(rows) >= MANY_ROWS and scales_rows(x.device):
        # The only dtype that a product with scales per row returns.
        added = None if bias is None else F.pad(bias.to(x.dtype), (0, weight.values.shape[0] - weight.out_features))
        out = _scaled_mm(values, weight.values.T, scale_a=scales, scale_b=weight.scales, bias=added, out_dtype=x.dtype)
        out = out[:, : weight.out_features]
    else:
        one = _one(x.device)
        sums = _scaled_mm(values, weight.values.T, scale_a=one, scale_b=one, out_dtype=torch.float32)
        out = scaled_sums(sums, scales, weight, bias)
    return out.reshape(*x.shape[:-1], weight.out_features)


def scaled_sums(
    sums: torch.Tensor, row_scales: torch.Tensor, weight: Fp8Weight, bias: torch.Tensor | None
) -> torch.Tensor:
    """Scale unscaled products `(rows, n or more)` and add the bias: `(rows, n)` of the weight's dtype."""
    size = weight.out_features
    if sums.is_cuda and has_triton():
        from sensorium.kernels.gpu.fp8 import scaled_sums as by_kernel

        out = torch.empty(len(sums), size, dtype=weight.dtype, device=sums.device)
        return by_kernel(sums, row_scales, weight.scales, bias, out)
    wide = (sums * row_scales * weight.scales)[:, :size]
    return (wide if bias is None else wide + bias).to(weight.dtype)


def _padded_rows(rows: torch.Tensor, weight: Fp8Weight) -> tuple[torch.Tensor, torch.Tensor]:
    """An input's rows in 8-bit floats, padded to the weight's width, and their scales."""
    width = weight.values.shape[1]
    if rows.is_cuda and has_triton():
        from sensorium.kernels.gpu.fp8 import quantize_fp8_rows as by_kernel

        return by_kernel(rows, width, weight.input_scale)
    values, scales = quantize_fp8_rows(rows, weight.input_scale)
    if width != values.shape[1]:
        values = F.pad(values.view(torch.uint8), (0, width - values.shape[1])).view(FP8)
    return values, scales


@cache
def scales_rows(device: torch.device) -> bool:
    """Whether a device supports products with scales per row, which depends on its generation and on torch's
    version."""
    rows = torch.zeros(ALIGNMENT, ALIGNMENT, dtype=torch.uint8, device=device).view(FP8)
    scales = torch.ones(ALIGNMENT, 1, device=device)
    try:
        _scaled_mm(rows, rows.T, scale_a=scales, scale_b=scales.T.contiguous(), out_dtype=torch.bfloat16)
    except (RuntimeError, ValueError, NotImplementedError):
        return False
    return True


@cache
def _one(device: torch.device) -> torch.Tensor:
    return torch.ones((), device=device)
