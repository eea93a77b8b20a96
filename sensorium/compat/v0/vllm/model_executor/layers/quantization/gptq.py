"""GPTQ, which is not served."""

from sensorium.model_executor.layers.quantization import QuantizationConfig

__all__ = ["GPTQConfig"]


class GPTQConfig(QuantizationConfig):
    """Never made: no model here has it."""
