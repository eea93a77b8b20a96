"""Root-mean-square normalisation, alone and fused with the residual addition before it.

Source: Zhang and Sennrich 2019, section 3; rounding as `transformers` `LlamaRMSNorm`: the normalised value is rounded
to the storage type before the weight is applied. A float32 weight over a narrower `x` is applied in float32, with one
rounding at the end (what Gemma-style `1 + weight` norms need).
"""

from __future__ import annotations

import torch


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


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(rms_norm(x + residual), x + residual)`; both are new tensors, the sum rounded to `x`'s dtype first."""
    total = x + residual
    return rms_norm_reference(total, weight, eps), total


rms_norm = rms_norm_reference
add_rms_norm = add_rms_norm_reference
