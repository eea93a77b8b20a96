"""Lines of batch files: what comes in, and what goes out.

    in   {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
    out  {"id": "batch_req_...", "custom_id": "a", "response": {"status_code": 200, "request_id": "...", "body": {...}},
          "error": null}

Source: OpenAI's API reference, "Batch", the request input and request output objects.
"""

from __future__ import annotations

import uuid

import msgspec

from sensorium.errors import InvalidRequestError

RECORD_START = b'{"id":"batch_req_'
"""The fields with which every output line begins."""
_MAX_ID_CHARS = 512


class BatchLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One request. Its body is not parsed here: the server does it."""

    custom_id: str
    url: str
    body: msgspec.Raw
    method: str = "POST"


class LineError(msgspec.Struct, frozen=True):
    """Why a line never became a request."""

    code: str
    message: str
    line: int
    """Its number in the input, from 1, by which a resumed run recognizes it."""


class Response(msgspec.Struct, frozen=True):
    """A server's answer."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class Record(msgspec.Struct, frozen=True):
    """One line of output."""

    id: str
    custom_id: str | None
    response: Response | None
    error: LineError | None

    @classmethod
    def answered(cls, custom_id: str, response: Response) -> Record:
        """The line for a request that was answered, with a result or an error."""
        return cls(_new_id(), custom_id, response, None)

    @classmethod
    def refused(cls, custom_id: str | None, number: int, message: str) -> Record:
        """The line for an input line that isn't a request."""
        return cls(_new_id(), custom_id, None, LineError("invalid_line", f"line {number}: {message}", number))

    @property
    def is_success(self) -> bool:
        """Whether the request succeeded."""
        return self.response is not None and 200 <= self.response.status_code < 300


def _new_id() -> str:
    return f"batch_req_{uuid.uuid4().hex}"


class _OnlyId(msgspec.Struct):
    custom_id: str | None = None


class _Streaming(msgspec.Struct):
    stream: bool | None = None


def parse_line(text: bytes) -> BatchLine:
    """Raises `InvalidRequestError` for a line that isn't a request."""
    try:
        line = msgspec.json.decode(text, type=BatchLine)
    except (msgspec.ValidationError, RecursionError) as error:
        raise InvalidRequestError(f"got a line that is no request ({error}). Correct it.") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise InvalidRequestError("got text that is no JSON, expected one JSON object a line. Correct it.") from None
    if not 0 < len(line.custom_id) <= _MAX_ID_CHARS:
        raise InvalidRequestError(
            f"got {len(line.custom_id)} characters, expected 1 to {_MAX_ID_CHARS}. Change it.", field="custom_id"
        )
    if line.method != "POST":
        raise InvalidRequestError(f"got {line.method!r:.40}, expected 'POST'. Change it.", field="method")
    if not bytes(line.body).lstrip().startswith(b"{"):
        raise InvalidRequestError("got something else, expected a JSON object. Change it.", field="body")
    if _is_streaming(line.body):
        raise InvalidRequestError(
            "got true, expected false: a line has one answer. Remove stream.", field="body.stream"
        )
    return line


def _is_streaming(body: msgspec.Raw) -> bool:
    try:
        return bool(msgspec.json.decode(body, type=_Streaming).stream)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False  # the server says what is wrong with it


def custom_id_of(text: bytes) -> str | None:
    """The id of a malformed line, if it can be read."""
    try:
        return msgspec.json.decode(text, type=_OnlyId).custom_id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
