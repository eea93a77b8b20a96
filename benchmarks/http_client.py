"""A small HTTP/1.1 client for load: one connection per task, and little work of its own per request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body's value."""
        return json.loads(self.body)


class Connection:
    """One connection to a server, opened when it is needed, kept alive between requests."""

    def __init__(self, url: str, timeout_s: float = 120.0) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._host, self._port = parts.hostname, parts.port or 80
        self._timeout_s = timeout_s
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> Self:
        """The connection itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close, at once."""
        self.close()

    def close(self) -> None:
        """Drop the connection, whatever is under way on it."""
        if self._writer is not None:
            self._writer.transport.abort()
        self._reader = self._writer = None

    async def request(self, method: str, path: str, body: bytes = b"", *headers: str) -> Answer:
        """Send a request and return its whole answer; the status is 0 if the server closed the connection instead."""
        async with asyncio.timeout(self._timeout_s):
            status, fields = await self._ask(method, path, body, headers)
            pieces = [piece async for piece in self._pieces(fields)] if status else []
        if fields.get("connection") == "close" or not status:
            self.close()
        return Answer(status, fields, b"".join(pieces))

    async def post(self, path: str, value: object, *headers: str) -> Answer:
        """`request` with a JSON body."""
        return await self.request("POST", path, json.dumps(value).encode(), *headers)

    async def stream(self, path: str, body: bytes, *headers: str) -> AsyncIterator[bytes]:
        """Post, and yield what arrives piece by piece; raises `ConnectionError` unless the status is 200."""
        async with asyncio.timeout(self._timeout_s):
            status, fields = await self._ask("POST", path, body, headers)
            if status != 200:
                text = b"".join([piece async for piece in self._pieces(fields)]) if status else b""
                raise ConnectionError(f"status {status}: {text.decode()}")
            async for piece in self._pieces(fields):
                yield piece

    async def raw(self, data: bytes, *, closes: bool = False) -> bytes:
        """All that comes back for these bytes, on a connection of their own; with `closes`, its sending side is closed
        behind them.
        """
        async with asyncio.timeout(self._timeout_s):
            reader, writer = await asyncio.open_connection(self._host, self._port)
            try:
                writer.write(data)
                await writer.drain()
                if closes:
                    writer.write_eof()
                return await reader.read()
            except ConnectionError:
                return b""
            finally:
                writer.transport.abort()

    async def _ask(self, method: str, path: str, body: bytes, headers: tuple[str, ...]) -> tuple[int, dict[str, str]]:
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection(self._host, self._port, limit=1 << 22)
        assert self._reader is not None
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self._host}:{self._port}", f"Content-Length: {len(body)}"]
        if not any(each.lower().startswith("content-type:") for each in headers):
            lines.append("Content-Type: application/json")
        self._writer.write("\r\n".join([*lines, *headers, "", ""]).encode() + body)
        try:
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            return 0, {}
        fields = {name.lower(): text.strip() for name, _, text in (line.partition(":") for line in head[1:])}
        return int(head[0].split()[1]), fields

    async def _pieces(self, fields: dict[str, str]) -> AsyncIterator[bytes]:
        assert self._reader is not None
        if fields.get("transfer-encoding") != "chunked":
            yield await self._reader.readexactly(int(fields.get("content-length", "0")))
            return
        while size := int(await self._reader.readline(), 16):
            yield (await self._reader.readexactly(size + 2))[:-2]
        await self._reader.readline()
