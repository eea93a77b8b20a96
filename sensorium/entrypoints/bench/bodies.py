"""Requests of a workload as the bytes that go to a server."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import msgspec

from sensorium.entrypoints.bench.media import Media
from sensorium.entrypoints.bench.workload import BenchRequest, MediaRef, RequestSource, messages
from sensorium.errors import ConfigError

MAX_PREPARED_BYTES = 4 << 30
"""Bound on the bytes of all bodies together; repeated media count once."""
_MARK = "\x00media\x00"


class BodyMaker:
    """Writes bodies for one model. Media stand in them as shared pieces: a body is a list of bytes."""

    def __init__(self, source: RequestSource, model: str, *, is_chat: bool, fields: Mapping[str, Any]) -> None:
        """`fields` go into every body."""
        self._source = source
        self._is_chat = is_chat
        self._head = {
            "model": model,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **fields,
        }
        self._pieces: dict[MediaRef, bytes] = {}
        self._num_bytes = 0

    def body(self, request: BenchRequest) -> list[bytes]:
        """One body. Raises `ConfigError` if all of them together grow too large."""
        content: dict[str, Any] = {**self._head, "max_tokens": request.num_output_tokens}
        if not self._is_chat:
            content["prompt"] = f"{request.system} {request.text}" if request.system else request.text
            return [self._counted(msgspec.json.encode(content))]
        content["messages"] = messages(request, [_part(self._source.media(ref)) for ref in request.media])
        texts = msgspec.json.encode(content).split(msgspec.json.encode(_MARK)[1:-1])
        pieces = [self._counted(texts[0])]
        for ref, text in zip(request.media, texts[1:], strict=True):
            pieces += [self._encoded(ref), self._counted(text)]
        return pieces

    def _encoded(self, ref: MediaRef) -> bytes:
        if ref not in self._pieces:
            self._pieces[ref] = self._counted(base64.b64encode(self._source.media(ref).data))
        return self._pieces[ref]

    def _counted(self, piece: bytes) -> bytes:
        self._num_bytes += len(piece)
        if self._num_bytes > MAX_PREPARED_BYTES:
            raise ConfigError(
                f"the workload: got bodies of more than {MAX_PREPARED_BYTES} bytes, expected at most so many. "
                "Set fewer requests, smaller media, or repeated_media."
            )
        return piece


def _part(media: Media) -> dict[str, Any]:
    """A content part with a mark where the base64 goes."""
    if media.modality == "audio":
        return {"type": "input_audio", "input_audio": {"data": _MARK, "format": media.media_type.partition("/")[2]}}
    kind = f"{media.modality}_url"
    return {"type": kind, kind: {"url": f"data:{media.media_type};base64,{_MARK}"}}
