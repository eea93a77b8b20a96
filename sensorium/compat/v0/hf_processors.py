"""Wrappers that give processors of transformers 5 the interface of its versions 4.45 to 4.47. They pass everything
on to the processor, except what has moved since."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sensorium.multimodal import hf_processors
from sensorium.multimodal.video_processor import cached_get_video_processor

_PIXELS = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
"""Bounds on a picture's pixels that used to be attributes, and their keys in `size`."""


class _Seen:
    """A wrapper that passes attributes on to another object."""

    def __init__(self, seen: Any, find_videos: Callable[[], Any]) -> None:
        self._seen = seen
        self._find_videos = find_videos

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_seen"], name)


class ImageProcessor(_Seen):
    """An image processor that also takes clips, and has the bounds on pixels as attributes."""

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
        """See `preprocess`."""
        return self.preprocess(images, videos, **kwargs)


class Token(str):
    """A special token that can be used as a text and as an object with `content`, as V0's files do."""

    __slots__ = ()

    @property
    def content(self) -> str:
        """The token as a text."""
        return str(self)


class Processor(_Seen):
    """A whole processor, whose image processor is an `ImageProcessor`."""

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
