"""HTTP/1.1 that can be read in one way only.

A proxy or firewall in front of a server reads requests too. If the two can read different requests from the same bytes,
a request can be smuggled past the proxy. h11 is the stricter of the parsers that uvicorn knows; what it accepts for old
clients is refused here: lines that end otherwise than by CRLF, folded lines, control characters, a length that is given
twice or beside chunks, chunks in HTTP/1.0, and chunks that are made of anything but data. Source: RFC 9112, sections
2.2, 5.2, 6 and 7.1; the bound on what chunks may hold beside data is that of Go's net/http (CVE-2023-39326).
"""

from __future__ import annotations

import re

import h11
from h11._receivebuffer import ReceiveBuffer

_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_BARE_NEWLINE = re.compile(rb"(?<!\r)\n")
_FREE_CHUNK_LINE_BYTES = 18
"""Sixteen hexadecimal digits and the end of the line."""
_MAX_CHUNK_LINE_BYTES = 1024
_MAX_CHUNK_EXCESS_BYTES = 16 << 10
_FREE_CHUNKS = 10_000
_LEAST_CHUNK_BYTES = 64
"""Least bytes of a chunk on average, after the first ones: a chunk costs as much to read as thousands of bytes."""


def _refuse(what: str) -> h11.LocalProtocolError:
    return h11.LocalProtocolError(what)


class StrictBuffer(ReceiveBuffer):
    """Bytes of a connection, out of which h11 reads lines."""

    def __init__(self) -> None:
        super().__init__()
        self._num_excess_bytes = 0

    def maybe_extract_lines(self) -> list[bytearray] | None:
        """See h11: the lines of a head, or of what follows the last chunk."""
        self._num_excess_bytes = 0
        if self._data[:2] == b"\r\n":
            self._extract(2)
            return []
        begin = max(0, self._multiple_lines_search - 3)
        end = self._data.find(b"\r\n\r\n", begin)
        if _BARE_NEWLINE.search(self._data, begin, len(self._data) if end < 0 else end):
            raise _refuse("a line that ends by a bare newline")
        if end < 0:
            self._multiple_lines_search = len(self._data)
            return None
        lines = self._extract(end + 4)[:-4].split(b"\r\n")
        _check_lines(lines)
        return lines

    def maybe_extract_next_line(self) -> bytearray | None:
        """See h11: the line in front of a chunk."""
        line = super().maybe_extract_next_line()
        if line is None:
            if len(self._data) > _MAX_CHUNK_LINE_BYTES:
                raise _refuse("a long line in front of a chunk")
            return None
        self._num_excess_bytes += max(0, len(line) - _FREE_CHUNK_LINE_BYTES)
        if len(line) > _MAX_CHUNK_LINE_BYTES or self._num_excess_bytes > _MAX_CHUNK_EXCESS_BYTES:
            raise _refuse("chunks of more extensions than data")
        if _CONTROL.search(line, 0, len(line) - 2):
            raise _refuse("a control character in front of a chunk")
        return line


def _check_lines(lines: list[bytearray]) -> None:
    num_lengths = 0
    for line in lines:
        if _CONTROL.search(line):
            raise _refuse("a control character")
        if line.startswith((b" ", b"\t")):
            raise _refuse("a folded line")
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            num_lengths += 1
            if num_lengths > 1 or not value.strip(b" \t").isdigit():
                raise _refuse("more than one length")


class StrictConnection(h11.Connection):
    """The server's side of a connection. Raises `h11.RemoteProtocolError` where h11 alone might go on.

    `is_turn_over`: so many events were taken since `begin_turn` that others should have their turn, and there may be
    more.
    """

    def __init__(self, max_head_bytes: int, max_events: int) -> None:
        super().__init__(h11.SERVER, max_head_bytes)
        self._receive_buffer = StrictBuffer()
        self._max_events = max_events
        self._num_events_left = max_events
        self._num_chunks = self._num_body_bytes = 0

    def begin_turn(self) -> None:
        """Let `max_events` more be taken."""
        self._num_events_left = self._max_events

    @property
    def is_turn_over(self) -> bool:
        """See the class."""
        return self._num_events_left == 0

    @property
    def num_buffered_bytes(self) -> int:
        """Received bytes that are not an event yet."""
        return len(self._receive_buffer)

    def next_event(self) -> type[h11.NEED_DATA | h11.PAUSED] | h11.Event:
        """See h11."""
        if not self._num_events_left:
            return h11.NEED_DATA
        event = super().next_event()
        if event is not h11.NEED_DATA and event is not h11.PAUSED:
            self._num_events_left -= 1
        if isinstance(event, h11.Request):
            _check_framing(event)
            self._num_chunks = self._num_body_bytes = 0
        elif isinstance(event, h11.Data):
            self._num_chunks += event.chunk_start
            self._num_body_bytes += len(event.data)
            if self._num_chunks > _FREE_CHUNKS + self._num_body_bytes // _LEAST_CHUNK_BYTES:
                raise h11.RemoteProtocolError("very many small chunks")
        return event


def _check_framing(request: h11.Request) -> None:
    names = {name for name, _ in request.headers}
    if request.http_version not in (b"1.0", b"1.1"):
        raise h11.RemoteProtocolError("another version", error_status_hint=505)
    if b"transfer-encoding" in names and (b"content-length" in names or request.http_version == b"1.0"):
        raise h11.RemoteProtocolError("chunks beside a length, or in HTTP/1.0")
