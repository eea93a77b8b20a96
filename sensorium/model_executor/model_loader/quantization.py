"""Which weights become int8 at load, and what a model's weights are stored as.

Layers that can be quantized say so by a method; models know nothing of it. Everything else stays as it is: embeddings,
norms, biases, convolutions, and linear layers that aren't ours.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from torch import nn

MAX_NAMES_IN_REPORT = 12


@runtime_checkable
class Quantizable(Protocol):
    """A layer whose weight can be held as integers."""

    is_quantized: bool

    def can_quantize(self) -> bool:
        """Whether the weight's shape allows it."""

    def quantize_weights_after_loading(self) -> None:
        """Called once, after every parameter has its value, in place of `process_weights_after_loading`."""


def quantized_names(model: nn.Module) -> list[str]:
    """The names of the layers whose weights are integers."""
    return [name for name, module in model.named_modules() if isinstance(module, Quantizable) and module.is_quantized]


def weights_line(model: nn.Module, quantization: str | None) -> str:
    """What became integers in a model for which that was asked, and what did not; empty where it was not asked."""
    if quantization is None:
        return ""
    quantized = quantized_names(model)
    floats = [(name, p) for name, p in model.named_parameters() if p.is_floating_point() and not p.is_meta]
    matrices = [name.removesuffix(".weight") for name, parameter in floats if parameter.dim() > 1]
    num_vectors = len(floats) - len(matrices)
    done = f"in {len(quantized)} layers ({_listing(quantized)})" if quantized else "in no layer"
    return (
        f"{quantization} weights {done}; in float: {_listing(matrices) or 'no matrix'}, and {num_vectors} vectors "
        f"(norms, biases){_plain_layers_note(model)}"
    )


def _plain_layers_note(model: nn.Module) -> str:
    """Which layers stay in float because of how the class is written, and how to have them quantized."""
    plain = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not plain:
        return ""
    return (
        f". torch.nn.Linear is never quantized ({_listing(plain)}): for integers there, let the class use the layers "
        "of sensorium.model_executor.layers.linear"
    )


def _listing(names: Iterable[str]) -> str:
    """Names with the numbers of layers left out, each once: `model.layers.*.mlp.down_proj`."""
    patterns = list(Counter(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names))
    shown = ", ".join(patterns[:MAX_NAMES_IN_REPORT])
    more = len(patterns) - MAX_NAMES_IN_REPORT
    return f"{shown} and {more} more" if more > 0 else shown
