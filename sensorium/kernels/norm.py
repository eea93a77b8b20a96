"""Root-mean-square normalisation, alone and fused with the residual addition before it.

Source: Zhang and Sennrich 2019, section 3; rounding as in `transformers` `LlamaRMSNorm`: the normalised value is
rounded to the storage type before the weight is applied. A float32 weight over a narrower `x` is applied in
float32, with one rounding at the end (what Gemma's `1 + weight` norms need).
"""

from __future__ import annotations

import torch

from sensorium.kernels.gpu import on_gpu
from sensorium.kernels.native import DTYPE_CODES, NativeLibrary, native_for, rows_of


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis.

    Args:
        x: `(..., hidden_size)`.
        weight: `(hidden_size,)`, of `x`'s dtype or float32.
        eps: Added to the mean square.

    Returns:
        A new tensor like `x`.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    if weight.dtype == x.dtype:
        normed = normed.to(x.dtype)
    return (normed * weight).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `rms_norm_reference`."""
    native = _native_norm(x, weight)
    if native is None:
        return _gpu_rms_norm(x, weight, eps) if on_gpu(x) else rms_norm_reference(x, weight, eps)
    rows = rows_of(x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    num_rows, size = rows.shape
    native.rms_norm(
        *(out.data_ptr(), 0, rows.data_ptr(), 0, weight.data_ptr(), num_rows, size, rows.stride(0), 0),
        *(eps, DTYPE_CODES[x.dtype], DTYPE_CODES[weight.dtype], torch.get_num_threads()),
    )
    return out


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(rms_norm(x + residual), x + residual)`; both are new tensors, the sum is rounded to `x`'s dtype first."""
    total = x + residual
    return rms_norm_reference(total, weight, eps), total


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `add_rms_norm_reference`."""
    native = _native_norm(x, weight)
    alike = residual.dtype == x.dtype and residual.shape == x.shape and residual.device == x.device
    if native is None or not alike:
        fused = _gpu_add_rms_norm if alike and on_gpu(x) else add_rms_norm_reference
        return fused(x, residual, weight, eps)
    rows, residual_rows = rows_of(x), rows_of(residual)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    num_rows, size = rows.shape
    native.rms_norm(
        *(out.data_ptr(), total.data_ptr(), rows.data_ptr(), residual_rows.data_ptr(), weight.data_ptr()),
        *(num_rows, size, rows.stride(0), residual_rows.stride(0)),
        *(eps, DTYPE_CODES[x.dtype], DTYPE_CODES[weight.dtype], torch.get_num_threads()),
    )
    return out, total


def _native_norm(x: torch.Tensor, weight: torch.Tensor) -> NativeLibrary | None:
    fits = weight.dtype in (x.dtype, torch.float32) and weight.is_cpu and weight.is_contiguous()
    return native_for(x) if fits else None


def _gpu_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    from sensorium.kernels.gpu.norm import rms_norm

    return rms_norm(x, weight, eps)


def _gpu_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    from sensorium.kernels.gpu.norm import add_rms_norm

    return add_rms_norm(x, residual, weight, eps)
