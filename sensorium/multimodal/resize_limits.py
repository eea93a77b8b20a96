"""Bounds on what preprocessing makes of a picture or a clip, checked before any of it is computed.

A decoder's limits see the media as sent. But resizing can make a thin picture huge: with a shortest edge of 224, one
pixel by ten thousand becomes 224 by 2,240,000. So can a size that a request asks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sensorium.errors import InvalidRequestError

MAX_PICTURE_PIXELS = 1 << 25
"""Pixels of one picture or frame after processing, about 5800 squared: 400 MB as float32."""
MAX_CLIP_PIXELS = 1 << 28
"""Pixels of all frames of a clip after processing: 3.2 GB as float32."""


def check_picture(processor: Any, height: int, width: int) -> None:
    """Refuse a picture that an image processor would make too large; `InvalidRequestError` (a `ValueError`)."""
    size = dict(getattr(processor, "size", None) or {})
    pixels = height * width
    if size and getattr(processor, "do_resize", True):
        pixels = _resized_pixels(size, height, width, counts_pixels=hasattr(processor, "merge_size"))
    for name in ("crop_size", "pad_size"):
        box = dict(getattr(processor, name, None) or {})
        pixels = max(pixels, box.get("height", 0) * box.get("width", 0))
    check_pixels("image", height, width, pixels)


def check_pixels(what: str, height: int, width: int, pixels: int, most: int = MAX_PICTURE_PIXELS) -> None:
    """Refuse `pixels` after processing; height and width are those of the media as given."""
    if pixels > most:
        raise InvalidRequestError(
            f"{what} size: {height}x{width} pixels would become {pixels} behind the processor, expected at most "
            f"{most}. Send media of a less extreme shape or length, or ask for a smaller size in mm_processor_kwargs."
        )


def _resized_pixels(size: Mapping[str, int], height: int, width: int, *, counts_pixels: bool) -> int:
    """Most pixels of a picture after resizing, by Hugging Face's ways of stating a size.

    `counts_pixels`: the edges in `size` are bounds on the number of pixels, as with Qwen2-VL.
    """
    short, long = size.get("shortest_edge"), size.get("longest_edge")
    if counts_pixels and short and long:
        return max(short, long)
    for box in (("height", "width"), ("max_height", "max_width")):
        if all(size.get(edge) for edge in box):
            return size[box[0]] * size[box[1]]
    ratio = max(height, width) / min(height, width)
    if short:
        longer = short * ratio
        return int(min(longer, long or longer) ** 2 / ratio)
    return int(long**2 / ratio) if long else height * width
