"""Videos: their plugin, and helpers on frames that model files call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sensorium.errors import InvalidTypeError
from sensorium.multimodal.context import InputContext
from sensorium.multimodal.hf_processors import processor_options, processor_settings
from sensorium.multimodal.image import ImagePlugin, preprocess, type_name
from sensorium.multimodal.inputs import MultiModalKwargs
from sensorium.multimodal.utils import is_list_of
from sensorium.multimodal.video_processor import cached_get_video_processor, resolve_video_backend

if TYPE_CHECKING:
    from sensorium.config import ModelConfig

__all__ = [
    "VideoPlugin",
    "cached_get_video_processor",
    "rescale_video_size",
    "resize_video",
    "sample_frames_from_video",
]

DEFAULT_MAX_VIDEO_TOKENS = 4096
"""Rows of one video, for a class that doesn't say."""

Frames = np.ndarray[Any, Any]
"""`(num_frames, height, width, 3)`."""


class VideoPlugin(ImagePlugin):
    """Videos: arrays of frames go through the checkpoint's video processor."""

    def get_data_key(self) -> str:
        """See `MultiModalPlugin`."""
        return "video"

    def _default_input_mapper(self, ctx: InputContext, data: Any, **mm_processor_kwargs: Any) -> MultiModalKwargs:
        """Map an array of frames `(num_frames, height, width, 3)`, or a list of them.

        Gives what the video processor returns: `pixel_values_videos`, with `video_grid_thw` for models of Qwen2-VL's
        kind. Raises `InvalidTypeError` (a `TypeError`) for anything else, `ProcessorError` (a `RuntimeError`) if there
        is no processor or it fails.
        """
        if isinstance(data, list) and len(data) == 1:
            data = data[0]
        if not (isinstance(data, np.ndarray) or is_list_of(data, np.ndarray, check="all")):
            raise InvalidTypeError(
                f"Invalid video type: got {type_name(data)}, expected an array of frames or a list of them. "
                f"Stack the frames into an array (num_frames, height, width, 3)."
            )
        settings = processor_settings(mm_processor_kwargs) | processor_options(ctx.model_config)
        return preprocess(cached_get_video_processor(ctx.model_config.model, **settings), data)

    def _default_max_multimodal_tokens(self, ctx: InputContext) -> int:
        return DEFAULT_MAX_VIDEO_TOKENS

    def _check_default_mapper(self, model_config: ModelConfig) -> None:
        resolve_video_backend(model_config.model, model_config.revision, model_config.mm_processor_backend)


def resize_video(frames: Frames, size: tuple[int, int]) -> Frames:
    """Frames at another size `(height, width)`, each resized bilinearly."""
    from PIL import Image

    height, width = size
    resized = [Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR) for frame in frames]
    return np.stack([np.asarray(frame) for frame in resized])


def rescale_video_size(frames: Frames, size_factor: float) -> Frames:
    """Frames with both sides multiplied by `size_factor`."""
    _, height, width, *_ = frames.shape
    return resize_video(frames, (int(height * size_factor), int(width * size_factor)))


def sample_frames_from_video(frames: Frames, num_frames: int) -> Frames:
    """`num_frames` frames at even distances, the first and the last among them; -1 means all."""
    if num_frames == -1:
        return frames
    indices = np.linspace(0, len(frames) - 1, num_frames, dtype=int)
    sampled: Frames = frames[indices]
    return sampled
