"""BitsAndBytes, which is not served."""

from sensorium.model_executor.layers.quantization import QuantizationConfig

__all__ = ["BitsAndBytesConfig"]


class BitsAndBytesConfig(QuantizationConfig):
    """Never made: no model here has it."""
