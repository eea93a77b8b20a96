"""What a model's weights are stored as, for the load report."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from torch import nn

from sensorium.model_executor.layers.quantization import QuantizationConfig
from sensorium.model_executor.layers.quantization.layer import WeightedLayer
from sensorium.model_executor.layers.quantization.unquantized import FLOAT, PACKED

MAX_NAMES_IN_REPORT = 12


def quantized_names(model: nn.Module) -> dict[str, list[str]]:
    """By the name of a method that quantizes: the names of the layers that hold their weights by it."""
    by_method: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, WeightedLayer) and module.packed is not None and module.method not in (FLOAT, PACKED):
            by_method.setdefault(module.method.name, []).append(name)
    return by_method


def weights_line(model: nn.Module, quant_config: QuantizationConfig | None) -> str:
    """What is quantized in a model for which that was asked, and what is not; empty where it was not asked."""
    if quant_config is None:
        return ""
    quantized = quantized_names(model) or {quant_config.name: []}
    floats = [(name, p) for name, p in model.named_parameters() if p.is_floating_point() and not p.is_meta]
    matrices = [name.removesuffix(".weight") for name, parameter in floats if parameter.dim() > 1]
    num_vectors = len(floats) - len(matrices)
    done = [
        f"{method} weights in {len(names)} layers ({_listing(names)})" if names else f"{method} weights in no layer"
        for method, names in quantized.items()
    ]
    return (
        f"{', '.join(done)}; in float: {_listing(matrices) or 'no matrix'}, and {num_vectors} vectors "
        f"(norms, biases){_plain_layers_note(model)}"
    )


def _plain_layers_note(model: nn.Module) -> str:
    """Which layers stay in float because of how the class is written, and how to have them quantized."""
    plain = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not plain:
        return ""
    return (
        f". torch.nn.Linear is never quantized ({_listing(plain)}): for that, let the class use the layers "
        "of sensorium.model_executor.layers.linear"
    )


def _listing(names: Iterable[str]) -> str:
    """Names with the numbers of layers left out, each once: `model.layers.*.mlp.down_proj`."""
    patterns = list(Counter(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names))
    shown = ", ".join(patterns[:MAX_NAMES_IN_REPORT])
    more = len(patterns) - MAX_NAMES_IN_REPORT
    return f"{shown} and {more} more" if more > 0 else shown
