"""A lean HTTP/1.1 client for streamed answers, which costs a load generator little time.

One connection carries one exchange at a time and is kept for the next. Body bytes are passed on in the same call that
reads them from the socket, with the time at which they arrived. It follows no redirects and uses no proxies and no
cookies.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from sensorium.errors import ConfigError

Sink = Callable[[int, bytes, float], None]
"""Takes the answer's status, a piece of its body, and the monotonic time at which it came, in seconds."""

_MAX_HEADER_BYTES = 64 << 10
_CONNECT_TIMEOUT_S = 30.0


class BrokenAnswerError(Exception):
    """The server closed the connection early, or sent something that isn't HTTP."""


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """Where a server is."""

    host: str
    port: int
    is_tls: bool
    prefix: str

    @classmethod
    def parse(cls, url: str) -> ServerAddress:
        """From a URL, with or without "/v1" at its end. Raises `ConfigError`."""
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise ConfigError(f"url: got {url!r}, expected an address such as http://127.0.0.1:8000. Set it.")
        is_tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port or (443 if is_tls else 80), is_tls, prefix)

    @property
    def host_header(self) -> str:
        """Host and port as a request names them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.is_tls else 80) else f"{host}:{self.port}"


class AnswerReader:
    """Parses one HTTP/1.1 answer as its bytes arrive. Does no I/O.

    Source: RFC 9112, sections 4 (status line), 6.3 (body length) and 7.1 (chunked coding).
    """

    def __init__(self) -> None:
        self.status = 0
        self.is_complete = False
        self.keep_alive = True
        self.ends_with_connection = False
        self._buffer = bytearray()
        self._remaining = 0
        self._step = self._head

    def feed(self, data: bytes) -> bytes:
        """The bytes of the body that `data` completes. Raises `BrokenAnswerError`."""
        self._buffer += data
        body = bytearray()
        while not self.is_complete and self._step(body):
            pass
        return bytes(body)

    def _head(self, body: bytearray) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > _MAX_HEADER_BYTES:
                raise BrokenAnswerError("headers without an end")
            return False
        first, *lines = bytes(self._buffer[:end]).decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        version, _, rest = first.partition(" ")
        if not version.startswith("HTTP/1.") or not rest[:3].isdecimal():
            raise BrokenAnswerError("no HTTP/1.1 answer")
        self.status = int(rest[:3])
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self.keep_alive = version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
        if 100 <= self.status < 200:
            return True
        self._begin_body(headers)
        return True

    def _begin_body(self, headers: dict[str, str]) -> None:
        if self.status in (204, 304):
            self.is_complete = True
        elif "chunked" in headers.get("transfer-encoding", "").lower():
            self._step = self._chunk_size
        elif (length := headers.get("content-length", "")).isdecimal():
            self._remaining, self._step = int(length), self._sized
            self.is_complete = not self._remaining
        else:
            self.ends_with_connection, self.keep_alive, self._step = True, False, self._unsized

    def _sized(self, body: bytearray) -> bool:
        self._take(body)
        self.is_complete = not self._remaining
        return False

    def _unsized(self, body: bytearray) -> bool:
        body += self._buffer
        self._buffer.clear()
        return False

    def _chunk_size(self, body: bytearray) -> bool:
        end = self._buffer.find(b"\r\n")
        if end < 0:
            return False
        try:
            self._remaining = int(self._buffer[:end].partition(b";")[0], 16)
        except ValueError:
            raise BrokenAnswerError("a chunk without a size") from None
        del self._buffer[: end + 2]
        self._step = self._chunk if self._remaining else self._trailer
        return True

    def _chunk(self, body: bytearray) -> bool:
        self._take(body)
        if self._remaining or len(self._buffer) < 2:
            return False
        del self._buffer[:2]
        self._step = self._chunk_size
        return True

    def _trailer(self, body: bytearray) -> bool:
        end = self._buffer.find(b"\r\n")
        if end < 0:
            return False
        self.is_complete = end == 0
        del self._buffer[: end + 2]
        return True

    def _take(self, body: bytearray) -> None:
        piece = self._buffer[: self._remaining]
        del self._buffer[: len(piece)]
        self._remaining -= len(piece)
        body += piece


class Connection(asyncio.Protocol):
    """One connection."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._reader = AnswerReader()
        self._sink: Sink | None = None
        self._done: asyncio.Future[None] | None = None
        self.is_usable = False

    async def exchange(self, request: Sequence[bytes], sink: Sink) -> int:
        """Send a request, hand its answer to `sink`, return the status.

        Raises:
            BrokenAnswerError, OSError: The exchange broke off.
        """
        assert self._transport is not None
        assert self._done is None
        self._reader, self._sink = AnswerReader(), sink
        self._done = asyncio.get_running_loop().create_future()
        is_complete = False
        try:
            self._transport.writelines(request)
            await self._done
            is_complete = True
        finally:
            self._done = self._sink = None
            if not (is_complete and self._reader.keep_alive):
                self.close()
        return self._reader.status

    @property
    def has_answer(self) -> bool:
        """Whether anything of the latest answer has come."""
        return self._reader.status != 0

    def close(self) -> None:
        """End the connection at once."""
        self.is_usable = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        assert isinstance(transport, asyncio.Transport)
        self._transport, self.is_usable = transport, True

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        now_s = time.monotonic()
        if self._sink is None or self._done is None or self._done.done():
            self.close()  # nobody asked
            return
        try:
            body = self._reader.feed(data)
            if body:
                self._sink(self._reader.status, body, now_s)
        except Exception as error:  # noqa: BLE001  the sink's errors too: both end this exchange
            self._done.set_exception(error)
            return
        if self._reader.is_complete:
            self._done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        """See asyncio."""
        self.is_usable = False
        if self._done is None or self._done.done():
            return
        if error is None and self._reader.ends_with_connection:
            self._done.set_result(None)
        else:
            self._done.set_exception(error or BrokenAnswerError("the server closed the connection early"))


class HttpClient:
    """Connections to one server, reused. Belongs to one event loop."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.address = ServerAddress.parse(url)
        self._authorization = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._tls = ssl.create_default_context() if self.address.is_tls else None
        self._idle: list[Connection] = []
        self._open: set[Connection] = set()

    def request(self, method: str, path: str, body: Sequence[bytes] = ()) -> list[bytes]:
        """A whole request, which `send` can send any number of times. Pieces of the body are not copied."""
        length = sum(map(len, body))
        head = (
            f"{method} {self.address.prefix}{path} HTTP/1.1\r\nHost: {self.address.host_header}\r\n"
            f"{self._authorization}Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        )
        return [head.encode("latin-1"), *body]

    async def send(self, request: Sequence[bytes], sink: Sink) -> int:
        """One exchange; returns the status. A kept connection that turns out to be closed is replaced once.

        Raises:
            BrokenAnswerError, OSError: The server can't be reached, or broke off.
        """
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_usable:
                self._open.discard(connection)
                continue
            try:
                return await self._exchange(connection, request, sink)
            except (BrokenAnswerError, OSError):
                if connection.has_answer:
                    raise
        return await self._exchange(await self._connect(), request, sink)

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of a plain request. Raises as `send`."""
        body = bytearray()
        status = await self.send(self.request("GET", path), lambda _, data, __: body.extend(data))
        return status, bytes(body)

    def close(self) -> None:
        """End all connections."""
        for connection in list(self._open):
            connection.close()
        self._idle.clear()
        self._open.clear()

    async def _exchange(self, connection: Connection, request: Sequence[bytes], sink: Sink) -> int:
        try:
            return await connection.exchange(request, sink)
        finally:
            if connection.is_usable:
                self._idle.append(connection)
            else:
                self._open.discard(connection)

    async def _connect(self) -> Connection:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            _, connection = await asyncio.get_running_loop().create_connection(
                Connection, self.address.host, self.address.port, ssl=self._tls
            )
        self._open.add(connection)
        return connection
