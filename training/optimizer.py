"""Muon for the matrices of the blocks, AdamW for everything else.

Muon (https://kellerjordan.github.io/posts/muon/) orthogonalises the momentum of a matrix by Newton-Schulz iterations.
Matrices of equal shape are stacked, so that a step costs a few large launches instead of thousands of small ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NUM_ITERATIONS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """Push all singular values of ``(count, rows, columns)`` towards one (they end between about 0.7 and 1.2)."""
    a, b, c = _COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_NUM_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    result: Tensor = x.mT if is_tall else x
    return result


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, scaled to AdamW's usual size of an update (0.2 RMS), with weight decay."""

    def __init__(
        self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for parameters in by_shape.values():
                self._step_stack(parameters, group)

    def _step_stack(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        buffers = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        looked_ahead = torch._foreach_lerp(gradients, buffers, group["momentum"])  # noqa: SLF001  has no public name
        dtype = torch.bfloat16 if parameters[0].is_cuda else torch.float32
        updates = orthogonalise(torch.stack(looked_ahead).to(dtype)).float()
        scale = 0.2 * max(parameters[0].shape) ** 0.5
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, list(updates.unbind()), alpha=-group["lr"] * scale)


def build_optimizers(network: nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the two-dimensional weights inside towers and decoder, AdamW for the rest."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        is_table = "embed" in name or name.startswith("lm_head") or "bos_eos" in name
        (matrices if parameter.ndim == 2 and not is_table else others).append(parameter)
    fused = others[0].is_cuda
    adam = torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=fused)
    return [Muon(matrices, lr=learning_rate), adam]
