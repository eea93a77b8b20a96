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
    """The names of the layers whose weights were quantized when they were loaded, by what they are held as now."""
    kinds: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, WeightedLayer) or module.loaded_by in (None, FLOAT):
            continue
        assert module.loaded_by is not None
        kind = f"{module.loaded_by.name} weights"
        if module.method in (FLOAT, PACKED):
            kind += f", held in {str(module.params_dtype).removeprefix('torch.')} on this device,"
        kinds.setdefault(kind, []).append(name)
    return kinds


def weights_line(model: nn.Module, quant_config: QuantizationConfig | None) -> str:
    """What is quantized in a model for which that was asked, and what is not; empty where it was not asked."""
    if quant_config is None:
        return ""
    quantized = quantized_names(model)
    floats = [(name, p) for name, p in model.named_parameters() if p.is_floating_point() and not p.is_meta]
    matrices = [name.removesuffix(".weight") for name, parameter in floats if parameter.dim() > 1]
    num_vectors = len(floats) - len(matrices)
    matrices += _packed_names(model)
    done = [f"{kind} in {len(names)} layers ({_listing(names)})" for kind, names in quantized.items()]
    return (
        f"{', '.join(done or [f'{quant_config.name} weights in no layer'])}; in float: "
        f"{_listing(matrices) or 'no matrix'}, and {num_vectors} vectors (norms, biases){_plain_layers_note(model)}"
    )


def _packed_names(model: nn.Module) -> list[str]:
    """The names of float layers whose weights lie in the layout of the kernels, and are no parameters any more."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, WeightedLayer)]
    return [name for name, layer in layers if layer.loaded_by is FLOAT and layer.weight.is_meta]


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
