"""Where two models part: the first layer of their decoders whose outputs differ, and the position."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_TOWERS = ("vision", "visual", "audio", "image", "speech")
TOLERANCE = 1e-3
"""Largest difference of a position's hidden states that counts as equal, relative to their size."""


@contextmanager
def recording(model: nn.Module, num_layers: int) -> Iterator[list[torch.Tensor]]:
    """While active, outputs `(num_tokens, hidden_size)` of a decoder's layers are listed, call by call."""
    found: list[torch.Tensor] = []
    handles = [layer.register_forward_hook(_noting(found)) for layer in _stack(model, num_layers)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _stack(model: nn.Module, num_layers: int) -> list[nn.Module]:
    stacks = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and not any(t in name for t in _TOWERS)
    ]
    return list(stacks[0]) if stacks else []


def _noting(found: list[torch.Tensor]) -> Callable[[nn.Module, Any, Any], None]:
    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        found.append(_hidden(output).detach().float().cpu())

    return note


def _hidden(output: Any) -> torch.Tensor:
    """What a layer hands on; with its residual, where that is added later."""
    if isinstance(output, torch.Tensor):
        hidden = output
    elif len(output) > 1 and isinstance(output[1], torch.Tensor) and output[1].shape == output[0].shape:
        hidden = output[0] + output[1]
    else:
        hidden = output[0]
    return hidden.reshape(-1, hidden.shape[-1])


def first_difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> tuple[int, int, float] | None:
    """The layer, the position and the relative difference where they part; None if they don't, or can't be compared."""
    for layer, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one.shape != other.shape:
            return None
        difference = (one - other).norm(dim=-1) / other.norm(dim=-1).clamp_min(1e-12)
        wrong = (~(difference <= TOLERANCE)).nonzero()
        if len(wrong):
            position = int(wrong[0])
            return layer, position, float(difference[position])
    return None
