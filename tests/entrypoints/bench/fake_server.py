"""A server of a few lines that answers as it is told: its bytes, its pauses, its early ends are the test's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

Answer = Callable[[str, bytes, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class FakeServer:
    url: str = ""
    bodies: list[bytes] = field(default_factory=list)
    heads: list[bytes] = field(default_factory=list)
    num_connections: int = 0
    num_open: int = 0
    most_open: int = 0


@asynccontextmanager
async def fake_server(answer: Answer) -> AsyncIterator[FakeServer]:
    state = FakeServer()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        state.num_connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    int(line.split(b":")[1])
                    for line in head.split(b"\r\n")
                    if line.lower().startswith(b"content-length")
                )
                body = await reader.readexactly(length)
                state.heads.append(head)
                state.bodies.append(body)
                state.num_open += 1
                state.most_open = max(state.most_open, state.num_open)
                try:
                    await answer(head.split(b" ")[1].decode(), body, writer)
                finally:
                    state.num_open -= 1
                await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass  # the client has gone, or the test is over
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    state.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield state
    finally:
        server.close()


def whole(body: bytes, status: str = "200 OK", extra: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{extra}\r\n".encode() + body


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def event(text: str) -> bytes:
    return chunk(f"data: {text}\n\n".encode())


def token(text: str = "x") -> bytes:
    return event(f'{{"choices": [{{"index": 0, "delta": {{"content": "{text}"}}, "finish_reason": null}}]}}')


def usage(num_prompt: int, num_output: int) -> bytes:
    return event(f'{{"choices": [], "usage": {{"prompt_tokens": {num_prompt}, "completion_tokens": {num_output}}}}}')
