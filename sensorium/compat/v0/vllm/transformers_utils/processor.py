"""Processors of checkpoints."""

from sensorium.compat.v0.hf_processors import cached_get_image_processor, cached_get_processor
from sensorium.multimodal.hf_processors import cached_get_tokenizer
from sensorium.multimodal.video_processor import cached_get_video_processor

get_processor = cached_get_processor
get_image_processor = cached_get_image_processor
get_video_processor = cached_get_video_processor

__all__ = [
    "cached_get_image_processor",
    "cached_get_processor",
    "cached_get_tokenizer",
    "get_image_processor",
    "get_processor",
    "get_video_processor",
]
