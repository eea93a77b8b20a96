"""What the requests of a benchmark hold: settings, and the requests that follow from them and a seed.

The same settings give the same requests. Each differs from every other in text and media, except for what
`shared_words` and `repeated_media` make common.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np

from sensorium.config import Amount, Count
from sensorium.entrypoints.bench import media
from sensorium.entrypoints.bench.media import Media
from sensorium.entrypoints.bench.spans import Size, Span
from sensorium.entrypoints.bench.words import WORDS
from sensorium.errors import ConfigError
from sensorium.settings import Bounds, check_settings

_NONE = Span(0, 0)
_EIGHT = Span(8, 8)
_SIXTY_FOUR = Span(64, 64)
_MEDIUM = Size(336, 336)
_SMALL = Size(224, 224)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """How many requests, and what is in them. Counts and lengths may be spans, from which each request draws."""

    num_requests: Count = 64
    """Requests that are measured."""
    seed: Amount = 0
    """Makes texts, media and arrival times; the same seed gives the same requests."""
    text_words: Span = _SIXTY_FOUR
    """Words of a request's own text, such as 64 or 32-128; a word takes most tokenizers a token."""
    shared_words: Amount = 0
    """Words of a system text that all requests share."""
    output_tokens: Span = _SIXTY_FOUR
    """Tokens that each request asks for."""
    images: Span = _NONE
    """Images in a request."""
    image_size: tuple[Size, ...] = (_MEDIUM,)
    """Sizes of images, such as 640x480, or with weights as 640x480:3; may be given several times."""
    image_format: Literal["jpeg", "png"] = "jpeg"
    """How images are encoded."""
    videos: Span = _NONE
    """Clips in a request."""
    video_size: Size = _SMALL
    """Size of a clip's frames."""
    video_frames: Span = _EIGHT
    """Frames in a clip."""
    audios: Span = _NONE
    """Sounds in a request."""
    audio_s: Annotated[float, Bounds(0, 3600, above=True)] = 2.0
    """Seconds of a sound."""
    repeated_media: Annotated[float, Bounds(0, 1)] = 0.0
    """Share of the media that an earlier request had already, 0 to 1."""

    def __post_init__(self) -> None:
        check_settings(self)
        if self.output_tokens.low < 1 or self.text_words.low < 1:
            raise ConfigError("output_tokens and text_words: got 0, expected at least 1. Set them.")

    @property
    def has_media(self) -> bool:
        """Whether there is more than text."""
        return bool(self.images.high or self.videos.high or self.audios.high)

    @property
    def media_limits(self) -> dict[str, int]:
        """Most items of each modality in one request."""
        spans = {"image": self.images, "video": self.videos, "audio": self.audios}
        return {name: span.high for name, span in spans.items() if span.high}


@dataclass(frozen=True, slots=True)
class MediaRef:
    """One of the workload's media: the `number`th of its modality. Equal numbers are equal items."""

    modality: str
    number: int


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """One request."""

    text: str
    system: str | None
    media: tuple[MediaRef, ...]
    num_output_tokens: int


@dataclass(frozen=True)
class RequestSource:
    """The requests of a workload. `offset` gives other requests of the same kind, as for warming up."""

    workload: Workload
    offset: int = 0
    _encoded: dict[MediaRef, Media] = field(default_factory=dict)

    def requests(self, count: int | None = None) -> Iterator[BenchRequest]:
        """The first `count` requests, all by default. Their media are numbers that `media` encodes."""
        used: dict[str, int] = {}
        for index in range(self.workload.num_requests if count is None else count):
            yield self._request(np.random.default_rng([self._seed, index]), used)

    def media(self, ref: MediaRef) -> Media:
        """An encoded item; cached, because requests may share it."""
        if ref not in self._encoded:
            self._encoded[ref] = self._make(ref)
        return self._encoded[ref]

    @property
    def _seed(self) -> int:
        return self.workload.seed + 1_000_003 * self.offset

    @cached_property
    def _system(self) -> str | None:
        count = self.workload.shared_words
        return _words(np.random.default_rng([self.workload.seed, 1 << 40]), count) if count else None

    def _request(self, rng: np.random.Generator, used: dict[str, int]) -> BenchRequest:
        workload = self.workload
        text, num_output_tokens = _words(rng, workload.text_words.draw(rng)), workload.output_tokens.draw(rng)
        counts = {"image": workload.images, "video": workload.videos, "audio": workload.audios}
        earlier = dict(used)
        refs = [
            MediaRef(modality, self._number(modality, rng, earlier, used))
            for modality, span in counts.items()
            for _ in range(span.draw(rng))
        ]
        return BenchRequest(text, self._system, tuple(refs), num_output_tokens)

    def _number(self, modality: str, rng: np.random.Generator, earlier: dict[str, int], used: dict[str, int]) -> int:
        """An item of an earlier request with probability `repeated_media`, else a new one."""
        if rng.random() < self.workload.repeated_media and earlier.get(modality):
            return int(rng.integers(earlier[modality]))
        used[modality] = used.get(modality, 0) + 1
        return used[modality] - 1

    def _make(self, ref: MediaRef) -> Media:
        workload, rng = self.workload, np.random.default_rng([self._seed, 1 << 41, ref.number])
        if ref.modality == "image":
            size = _weighted(rng, workload.image_size)
            return media.image(self._seed, ref.number, size.width, size.height, workload.image_format)
        if ref.modality == "video":
            size, num_frames = workload.video_size, max(1, workload.video_frames.draw(rng))
            return media.clip(self._seed, ref.number, size.width, size.height, num_frames)
        return media.sound(self._seed, ref.number, workload.audio_s)


def _words(rng: np.random.Generator, count: int) -> str:
    return " ".join(WORDS[index] for index in rng.integers(len(WORDS), size=count))


def _weighted(rng: np.random.Generator, sizes: Sequence[Size]) -> Size:
    weights = np.array([size.weight for size in sizes])
    return sizes[int(rng.choice(len(sizes), p=weights / weights.sum()))]


def messages(request: BenchRequest, media_parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The request as a chat: media first, then its text."""
    content: Any = [*media_parts, {"type": "text", "text": request.text}] if media_parts else request.text
    chat = [{"role": "user", "content": content}]
    return [{"role": "system", "content": request.system}, *chat] if request.system else chat
