"""Processors of transformers 5, seen as those of its versions 4.45 to 4.47: whatever is asked of one is asked of the
processor itself, but for what has another place now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sensorium.multimodal import hf_processors
from sensorium.multimodal.video_processor import cached_get_video_processor

_PIXELS = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
"""Bounds on a picture's pixels that were attributes, and where they are in `size`."""


class _Seen:
    """Something that has another's attributes."""

    def __init__(self, seen: Any, find_videos: Callable[[], Any]) -> None:
        self._seen = seen
        self._find_videos = find_videos

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_seen"], name)


class ImageProcessor(_Seen):
    """An image processor: one that takes clips too, with the bounds on pixels as attributes."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["_seen"], name, None)
        if value is None and name in _PIXELS:
            return self.__dict__["_seen"].size[_PIXELS[name]]
        return super().__getattr__(name)

    def preprocess(self, images: Any = None, videos: Any = None, **kwargs: Any) -> Any:
        """Tensors of pictures, or of clips."""
        if videos is not None:
            return self._find_videos().preprocess(videos, **kwargs)
        return self._seen.preprocess(images, **kwargs)

    def __call__(self, images: Any = None, videos: Any = None, **kwargs: Any) -> Any:
        """The same."""
        return self.preprocess(images, videos, **kwargs)


class Token(str):
    """A special token, which was an object in some processors and a text in others."""

    __slots__ = ()

    @property
    def content(self) -> str:
        """The token as a text."""
        return str(self)


class Processor(_Seen):
    """A whole processor, whose image processor is such a one."""

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return Token(value) if isinstance(value, str) and name.endswith("_token") else value

    @property
    def image_processor(self) -> Any:
        """The part for pictures."""
        return ImageProcessor(self._seen.image_processor, self._find_videos)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """All parts at once."""
        return self._seen(*args, **kwargs)


def cached_get_image_processor(processor_name: str, *args: Any, **kwargs: Any) -> ImageProcessor:
    """See `sensorium.multimodal.hf_processors`."""
    processor = hf_processors.cached_get_image_processor(processor_name, *args, **kwargs)
    return ImageProcessor(processor, lambda: cached_get_video_processor(processor_name, **kwargs))


def cached_get_processor(processor_name: str, *args: Any, **kwargs: Any) -> Processor:
    """See `sensorium.multimodal.hf_processors`."""
    processor = hf_processors.cached_get_processor(processor_name, *args, **kwargs)
    return Processor(processor, lambda: cached_get_video_processor(processor_name))
