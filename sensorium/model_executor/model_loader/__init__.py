"""Loading models: from an engine configuration to a module with checked weights."""

from sensorium.model_executor.model_loader.loader import build_without_memory, fill_model, finish_loading, load_model
from sensorium.model_executor.model_loader.weight_utils import (
    default_weight_loader,
    load_fused_weights,
    safetensors_weights,
)

__all__ = [
    "build_without_memory",
    "default_weight_loader",
    "fill_model",
    "finish_loading",
    "load_fused_weights",
    "load_model",
    "safetensors_weights",
]
