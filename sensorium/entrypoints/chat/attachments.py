"""Pictures, clips and sounds that people name by path or address."""

from __future__ import annotations

import mimetypes
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sensorium.errors import InvalidRequestError

MODALITIES = ("image", "video", "audio")
_MAX_BYTES = 1 << 30
_HEAD_BYTES = 64
_OPENAI_AUDIO = {"audio/wav": "wav", "audio/x-wav": "wav", "audio/mpeg": "mp3"}
"""The formats that OpenAI's `input_audio` takes."""
_IMAGE_STARTS = {
    b"\x89PNG": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"BM": "image/bmp",
    b"II*\x00": "image/tiff",
    b"MM\x00*": "image/tiff",
}
_VIDEO_TYPES = {"mov": "video/mp4", "matroska": "video/x-matroska", "avi": "video/x-msvideo"}
_AUDIO_TYPES = {"wav": "audio/wav", "mp3": "audio/mpeg", "ogg": "audio/ogg", "flac": "audio/flac", "aiff": "audio/aiff"}


@dataclass(frozen=True)
class Attachment:
    """A media item of a message: a file's bytes, read when it was named, or an address."""

    modality: str
    name: str
    """The path or address as it was given."""
    data: bytes | None
    """None for an address: the backend fetches it, by its own rules."""
    media_type: str

    @cached_property
    def part(self) -> dict[str, Any]:
        """The content part of OpenAI's API."""
        from sensorium.media.encode import to_data_url

        if self.data is None:
            return _url_part(self.modality, self.name)
        url = to_data_url(self.data, self.media_type)
        if self.media_type in _OPENAI_AUDIO:
            data = url.partition(",")[2]
            return {"type": "input_audio", "input_audio": {"data": data, "format": _OPENAI_AUDIO[self.media_type]}}
        return _url_part(self.modality, url)

    @property
    def named_part(self) -> dict[str, Any]:
        """The same with the name in place of the content, for display."""
        return _url_part(self.modality, self.name)


def attach(source: str, modality: str | None = None) -> Attachment:
    """Read a file, or take an address as it is. The modality follows from the content if it isn't given.

    Raises:
        InvalidRequestError: There is no such file, or its modality can't be told.
    """
    if source.startswith(("http://", "https://")):
        media_type = mimetypes.guess_type(source.partition("?")[0])[0] or ""
        return Attachment(modality or _modality_of(media_type) or "image", source, None, media_type)
    path = Path(source.removeprefix("file://")).expanduser()
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise InvalidRequestError(
            f"got {source!r}, expected a file ({error.strerror}). Check the path.", field="media"
        ) from None
    if len(data) > _MAX_BYTES:
        raise InvalidRequestError(
            f"got {source!r} with more than {_MAX_BYTES} bytes, expected at most so many.", field="media"
        )
    media_type = media_type_of(path, data[:_HEAD_BYTES])
    found = modality or _modality_of(media_type)
    if found is None:
        raise InvalidRequestError(
            f"got {source!r}, which is neither a picture nor a clip nor a sound, expected one of them. Say "
            "which it is: image, video or audio.",
            field="media",
        )
    return Attachment(found, source, data, media_type)


def media_type_of(path: Path, head: bytes) -> str:
    """The media type by a file's first bytes, or by its name."""
    from sensorium.media.sniff import find_stream

    for start, media_type in _IMAGE_STARTS.items():
        if head.startswith(start):
            return media_type
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image/webp"
    guessed = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    found = find_stream(head)
    if found is None:
        return guessed
    container, _ = found
    if container in _VIDEO_TYPES and _modality_of(guessed) in ("audio", "image"):
        return guessed  # containers of clips also hold sounds (m4a) and pictures (avif)
    return _VIDEO_TYPES.get(container) or _AUDIO_TYPES.get(container) or guessed


def looks_like_media(path: Path) -> bool:
    """Whether a file is a picture, a clip or a sound, by its first bytes or its name."""
    try:
        with path.open("rb") as file:
            return _modality_of(media_type_of(path, file.read(_HEAD_BYTES))) is not None
    except OSError:
        return False


def _modality_of(media_type: str) -> str | None:
    kind = media_type.partition("/")[0]
    return kind if kind in MODALITIES else None


def _url_part(modality: str, url: str) -> dict[str, Any]:
    return {"type": f"{modality}_url", f"{modality}_url": {"url": url}}
