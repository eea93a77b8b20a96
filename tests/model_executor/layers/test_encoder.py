"""The layer that towers are made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sensorium.model_executor.layers.encoder import EncoderLayer
from sensorium.model_executor.layers.layernorm import RMSNorm


class Attended(nn.Module):
    """In the place of attention: other numbers of the same shape."""

    def forward(self, hidden_states: torch.Tensor, *_: Any) -> torch.Tensor:
        return hidden_states.roll(1, 0) * 0.7


class Unfused(nn.Module):
    """A norm of the same numbers that doesn't know residuals."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaled_size", [None, 48])
def test_the_sum_in_the_norms_launch_changes_no_bit(dtype: torch.dtype, scaled_size: int | None) -> None:
    torch.manual_seed(0)
    norm1, norm2 = RMSNorm(48, dtype=dtype), RMSNorm(48, dtype=dtype)
    for norm in (norm1, norm2):
        nn.init.normal_(norm.weight)
    attended: Any = Attended()
    fused = EncoderLayer(attended, nn.Tanh(), norm1, norm2, scaled_size)
    plain = EncoderLayer(attended, nn.Tanh(), norm1, Unfused(norm2), scaled_size)
    if scaled_size is not None:
        for name in ("scale1", "scale2"):
            scale = torch.randn(scaled_size)
            for layer in (fused, plain):
                getattr(layer, name).data = scale.to(dtype)
    x = torch.randn(11, 48).to(dtype)
    before = x.clone()
    assert torch.equal(fused(x), plain(x))
    assert torch.equal(x, before)
