"""One request to the origin of a media item, whose answer is metered on the wire.

The origin is not trusted. No answer may keep the event loop busy: heads are bounded, including the informational
answers before them; bytes are counted before they are parsed; and a body may not arrive in more pieces than its size
justifies. The caller's deadline bounds all waiting, and no single read blocks the loop for long.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpcore

from sensorium.media.address import IPAddress
from sensorium.media.url import RemoteUrl

MAX_HEAD_BYTES = 32 << 10
"""Most bytes of an answer's head and of everything that an origin sends before it."""
_HEAD_READ_BYTES = 4 << 10
_BODY_READ_BYTES = 64 << 10
_FREE_PIECES = 256
_MIN_PIECE_BYTES = 64
"""Least bytes of a piece on average, not counting the free ones. A piece costs some 50 microseconds, whatever its
size."""


class TooFinelyChopped(Exception):  # noqa: N818  it is a state of a body, and stays in this room
    """A body comes in far more pieces than a body of its size has."""


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """An origin's answer.

    Attributes:
        status: of HTTP.
        headers: by lower-case name; where one stands more than once, all its values with commas between.
        body: pieces as they come. Raises `TooFinelyChopped`, and what `ask` raises.
    """

    status: int
    headers: Mapping[str, str]
    body: AsyncIterator[bytes]


@asynccontextmanager
async def ask(
    url: RemoteUrl, address: IPAddress, context: ssl.SSLContext | None, *, connect_timeout_s: float, max_bytes: int
) -> AsyncIterator[Answer]:
    """GET `url` from `address`, over a connection of its own that is closed behind it.

    Args:
        context: verifies the origin; its name is the URL's, not the address.
        max_bytes: the most that a body may have. No more are read from the wire, except for the head and the framing.

    Raises:
        httpcore.ConnectError, httpcore.ConnectTimeout: No connection, or no valid certificate.
        httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException: The answer breaks off, or isn't HTTP.
    """
    meter = _Meter(MAX_HEAD_BYTES + max_bytes + max_bytes // 8)
    origin = httpcore.Origin(url.scheme.encode(), str(address).encode(), url.port)
    connection = httpcore.AsyncHTTPConnection(
        origin, ssl_context=context, network_backend=_MeteredBackend(meter), retries=0
    )
    request = httpcore.Request(
        "GET",
        httpcore.URL(scheme=origin.scheme, host=origin.host, port=origin.port, target=url.target.encode("ascii")),
        headers=[
            ("Host", url.netloc),
            ("User-Agent", "Sensorium media fetcher"),
            ("Accept", "*/*"),
            ("Accept-Encoding", "identity"),
            ("Connection", "close"),
        ],
        extensions={"sni_hostname": url.host, "timeout": {"connect": connect_timeout_s}},
    )
    try:
        response = await connection.handle_async_request(request)
        meter.has_head = True
        yield Answer(response.status, _joined(response.headers), _pieces(response.aiter_stream()))
    finally:
        await connection.aclose()


def _joined(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    joined: dict[str, str] = {}
    for raw_name, raw_value in headers:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        joined[name] = f"{joined[name]}, {value}" if name in joined else value
    return joined


async def _pieces(body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    num_pieces = num_bytes = 0
    async for piece in body:
        num_pieces += 1
        num_bytes += len(piece)
        if num_pieces > _FREE_PIECES and num_bytes < num_pieces * _MIN_PIECE_BYTES:
            raise TooFinelyChopped
        yield piece


class _Meter:
    """Counts the bytes read from one connection. Invariant: no more is read than is allowed."""

    def __init__(self, max_bytes: int) -> None:
        self.has_head = False
        self._max_bytes = max_bytes
        self._num_bytes = 0

    def next_read_bytes(self, wanted: int) -> int:
        """How many bytes may be read next. Raises `httpcore.RemoteProtocolError` if none may."""
        left = (self._max_bytes if self.has_head else MAX_HEAD_BYTES) - self._num_bytes
        if left <= 0:
            raise httpcore.RemoteProtocolError("more bytes than an answer of this kind has")
        return min(wanted, left, _BODY_READ_BYTES if self.has_head else _HEAD_READ_BYTES)

    def count(self, num_bytes: int) -> None:
        """Count bytes that were read."""
        self._num_bytes += num_bytes


class _MeteredStream(httpcore.AsyncNetworkStream):
    """A connection whose reads are metered, before and after it turns to TLS."""

    def __init__(self, stream: httpcore.AsyncNetworkStream, meter: _Meter) -> None:
        self._stream = stream
        self._meter = meter

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        data = await self._stream.read(self._meter.next_read_bytes(max_bytes), timeout)
        self._meter.count(len(data))
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.AsyncNetworkStream:
        return _MeteredStream(await self._stream.start_tls(ssl_context, server_hostname, timeout), self._meter)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _MeteredBackend(httpcore.AsyncNetworkBackend):
    """Opens connections that are metered."""

    def __init__(self, meter: _Meter) -> None:
        self._meter = meter
        self._backend = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        stream = await self._backend.connect_tcp(host, port, timeout, local_address, socket_options)
        return _MeteredStream(stream, self._meter)
