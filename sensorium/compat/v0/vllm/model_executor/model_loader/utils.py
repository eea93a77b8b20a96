"""Helpers of constructors."""

from sensorium.model_executor.model_loader.initialize import default_dtype as set_default_torch_dtype

__all__ = ["set_default_torch_dtype"]
