"""Root-mean-square normalisation as a layer."""

from __future__ import annotations

from typing import overload

import torch
from torch import nn

from sensorium.kernels import add_rms_norm, rms_norm
from sensorium.model_executor.layers.parameters import copy_weight, new_parameter


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight`, alone or fused with the residual addition before it.

    With a residual it returns `(norm(x + residual), x + residual)`: a decoder passes the sum on as its residual.
    Neither argument is changed. Source: Zhang and Sennrich 2019; rounding as in `transformers` `LlamaRMSNorm`.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.variance_epsilon = eps
        self.weight = new_parameter(hidden_size, dtype=dtype)

    @overload
    def forward(self, x: torch.Tensor, residual: None = None) -> torch.Tensor: ...

    @overload
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """`(..., hidden_size)` to the same shape; see the class."""
        if residual is None:
            return rms_norm(x, self.weight, self.variance_epsilon)
        return add_rms_norm(x, residual, self.weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.weight.shape[0]}, eps={self.variance_epsilon}"


class WideRMSNorm(RMSNorm):
    """`RMSNorm` whose weight is applied in float32, before the result is rounded. Source: `transformers`
    `GptOssRMSNorm`."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps, torch.float32)


class ZeroCenteredRMSNorm(RMSNorm):
    """`RMSNorm` whose checkpoint stores `weight - 1`, and whose weight is applied in float32.

    Source: `transformers` `Gemma3RMSNorm`, `Qwen3_5RMSNorm`.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps)
        self.weight = new_parameter(hidden_size, dtype=torch.float32, loader=_load_zero_centered)


def _load_zero_centered(parameter: torch.Tensor, loaded: torch.Tensor) -> None:
    copy_weight(parameter, loaded.float() + 1.0, "the weight of a norm")
