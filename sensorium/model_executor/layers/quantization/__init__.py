"""How linear layers and output heads hold their weights.

base_config.py     `QuantizationConfig`, which chooses each layer's `LinearMethod`, which holds the weight layer.py
`WeightedLayer`, the base class of linear layers and heads, which calls the method registry.py        configs by name:
the setting `quantization`, or `quant_method` in a checkpoint unquantized.py     float weights, plain and in the layout
of the CPU's kernels int8.py            ...and one file for each quantization
"""

from sensorium.model_executor.layers.quantization.base_config import LinearMethod, QuantizationConfig
from sensorium.model_executor.layers.quantization.registry import (
    check_quantization,
    checkpoint_settings,
    quantization_class,
    quantization_names,
    register_quantization,
    resolve_quantization,
)

__all__ = [
    "LinearMethod",
    "QuantizationConfig",
    "check_quantization",
    "checkpoint_settings",
    "quantization_class",
    "quantization_names",
    "register_quantization",
    "resolve_quantization",
]
