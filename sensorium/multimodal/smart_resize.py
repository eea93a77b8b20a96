"""The size to which models with dynamic resolution resize a picture. No torch: placeholders are counted with it."""

from __future__ import annotations

import math

from sensorium.errors import InvalidRequestError

_MAX_ASPECT_RATIO = 200


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size `(height, width)` to which Qwen2-VL and its kin resize a picture or a frame.

    Both sides become multiples of `factor`, the number of pixels comes to lie within `[min_pixels, max_pixels]`, and
    the aspect ratio changes as little as that allows. Raises `InvalidRequestError` (a `ValueError`) for a picture more
    than 200 times as long as wide.

    Source: `smart_resize` of Hugging Face's `Qwen2VLImageProcessor`.
    """
    _check_aspect_ratio(height, width)
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def smart_resize_clip(
    num_frames: int, height: int, width: int, factor: int, depth: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """The size `(height, width)` to which Qwen3-VL resizes the frames of a clip, whose pixels count together.

    As `smart_resize`, with frames rounded to a multiple of `depth`; what is smaller than `factor` is enlarged first.

    Source: `smart_resize` of Hugging Face's `Qwen3VLVideoProcessor`.
    """
    if min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    _check_aspect_ratio(height, width)
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    pixels = round(num_frames / depth) * depth * new_height * new_width
    if pixels > max_pixels:
        shrink = math.sqrt(num_frames * height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif pixels < min_pixels:
        grow = math.sqrt(min_pixels / (num_frames * height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def _check_aspect_ratio(height: int, width: int) -> None:
    if max(height, width) > _MAX_ASPECT_RATIO * min(height, width):
        raise InvalidRequestError(
            f"Image size: got {width}x{height}, expected an aspect ratio of at most {_MAX_ASPECT_RATIO}. "
            f"Crop or pad the image."
        )
