"""Uploads: a multipart body read part by part, bounded while it arrives, and never written to a disk.

File names given by the sender are ignored.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect, Request

from sensorium.errors import InvalidRequestError, RequestAbortedError
from sensorium.media.limits import bytes_too_large

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # the error tells the client what it did wrong

MAX_PARTS = 32
MAX_FIELD_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Form:
    """A body's parts by name."""

    fields: dict[str, str] = field(default_factory=dict)
    file: bytes = field(default=b"", repr=False)


async def read_form(request: Request, *, file_name: str, modality: str, max_file_bytes: int) -> Form:
    """The body of an upload with one file.

    Args:
        request: the request.
        file_name: name of the part that is the file; all others are texts.
        modality: what the file is, for errors.
        max_file_bytes: bound on it.

    Raises:
        InvalidRequestError: It isn't such a body, or a part is missing, duplicated, or not text.
        MediaTooLargeError: The file has too many bytes.
        RequestAbortedError: The client is gone.
    """
    kind, options = parse_options_header(request.headers.get("Content-Type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise InvalidRequestError("the body: got another content type, expected multipart/form-data with a boundary.")
    reader = _FormReader(file_name, modality, max_file_bytes)
    try:
        parser = MultipartParser(boundary, reader.callbacks())
        async for chunk in request.stream():
            parser.write(chunk)
        parser.finalize()
    except FormParserError:
        raise _unreadable() from None
    except ClientDisconnect:
        raise RequestAbortedError("the client has gone.") from None
    return reader.form()


class _FormReader:
    """Collects parts as the parser finds them. Invariant: what it holds is within the bounds."""

    def __init__(self, file_name: str, modality: str, max_file_bytes: int) -> None:
        self._file_name = file_name
        self._modality = modality
        self._max_file_bytes = max_file_bytes
        self._parts: dict[str, bytearray] = {}
        self._header, self._value, self._disposition = b"", b"", b""
        self._name = ""
        self._is_complete = False

    def callbacks(self) -> MultipartCallbacks:
        """For the parser."""
        return {
            "on_part_begin": self._part_begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._part_data,
            "on_end": self._end,
        }

    def form(self) -> Form:
        """Everything collected. Raises `InvalidRequestError`."""
        if not self._is_complete:
            raise _unreadable()
        file = self._parts.pop(self._file_name, b"")
        if not file:
            raise InvalidRequestError(f"got nothing, expected a file. Add {self._file_name}.", field=self._file_name)
        try:
            return Form({name: value.decode() for name, value in self._parts.items()}, bytes(file))
        except UnicodeDecodeError:
            raise InvalidRequestError("the body: got a field that is no text in UTF-8. Correct it.") from None

    def _part_begin(self) -> None:
        self._disposition = b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        # Clients write lists as "name[]".
        self._name = name = options.get(b"name", b"").decode("utf-8", "replace").removesuffix("[]")
        if not name:
            raise InvalidRequestError("the body: got a part without a name, expected named ones.")
        if name in self._parts:
            raise InvalidRequestError("got it twice, expected it once. Remove one.", field=name[:60])
        if len(self._parts) == MAX_PARTS:
            raise InvalidRequestError(f"the body: got more than {MAX_PARTS} parts, expected fewer.")
        if b"filename" in options and name != self._file_name:
            raise InvalidRequestError(
                f"got a file, expected none there. Send it as {self._file_name}.", field=name[:60]
            )
        self._parts[name] = bytearray()

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        part = self._parts[self._name]
        is_file = self._name == self._file_name
        if is_file and len(part) + end - start > self._max_file_bytes:
            raise bytes_too_large(self._modality, self._max_file_bytes, self._max_file_bytes, at_least=True)
        if not is_file and len(part) + end - start > MAX_FIELD_BYTES:
            raise InvalidRequestError(
                f"got more than {MAX_FIELD_BYTES} bytes, expected fewer. Shorten it.", field=self._name[:60]
            )
        part += data[start:end]

    def _end(self) -> None:
        self._is_complete = True


def _unreadable() -> InvalidRequestError:
    return InvalidRequestError("the body: got something else, expected complete multipart/form-data.")
