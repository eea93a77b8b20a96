"""Processors of pictures, as files know them."""

from sensorium.compat.v0.hf_processors import cached_get_image_processor

__all__ = ["cached_get_image_processor"]
