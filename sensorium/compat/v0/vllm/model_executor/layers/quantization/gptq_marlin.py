"""GPTQMarlin, which is not served."""

from sensorium.model_executor.layers.quantization import QuantizationConfig

__all__ = ["GPTQMarlinConfig"]


class GPTQMarlinConfig(QuantizationConfig):
    """Never made: no model here has it."""
