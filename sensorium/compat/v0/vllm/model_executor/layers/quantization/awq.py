"""AWQ, which is not served."""

from sensorium.model_executor.layers.quantization import QuantizationConfig

__all__ = ["AWQConfig"]


class AWQConfig(QuantizationConfig):
    """Never made: no model here has it."""
