"""The load generator's client: answers in every form HTTP/1.1 has, in pieces of every size, and what breaks."""

from __future__ import annotations

import asyncio

import pytest

from sensorium.entrypoints.bench.events import EventReader
from sensorium.entrypoints.bench.http_client import AnswerReader, BrokenAnswerError, HttpClient, ServerAddress
from sensorium.errors import ConfigError
from tests.entrypoints.bench.fake_server import END, STREAM_HEAD, chunk, fake_server, whole

CHUNKED = STREAM_HEAD + chunk(b"one") + b"A;note=1\r\n0123456789\r\n" + END
ANSWERS = {
    "sized": (whole(b"hello"), b"hello"),
    "empty": (whole(b""), b""),
    "chunked": (CHUNKED, b"one0123456789"),
    "trailers": (CHUNKED[:-2] + b"X-Sum: 1\r\n\r\n", b"one0123456789"),
    "continued": (b"HTTP/1.1 100 Continue\r\n\r\n" + whole(b"hello"), b"hello"),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
}


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("size", [1, 2, 7, 10_000])
def test_an_answer_in_pieces_of_any_size(name: str, size: int) -> None:
    data, expected = ANSWERS[name]
    reader, body = AnswerReader(), b""
    for start in range(0, len(data), size):
        assert not reader.is_complete
        body += reader.feed(data[start : start + size])
    assert (reader.is_complete, body, reader.keep_alive) == (True, expected, True)


def test_an_answer_that_ends_with_its_connection() -> None:
    reader = AnswerReader()
    assert reader.feed(b"HTTP/1.0 200 OK\r\n\r\nabc") + reader.feed(b"def") == b"abcdef"
    assert (reader.is_complete, reader.ends_with_connection, reader.keep_alive) == (False, True, False)


@pytest.mark.parametrize(
    "data", [b"SSH-2.0\r\n\r\n", STREAM_HEAD + b"zz\r\n", b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 20_000]
)
def test_what_is_no_answer_is_an_error(data: bytes) -> None:
    with pytest.raises(BrokenAnswerError):
        AnswerReader().feed(data)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_events_in_pieces_of_any_size(size: int) -> None:
    data = b": note\n\ndata: one\n\ndata:two\r\n\r\nevent: x\ndata: a\ndata: b\n\ndata: torn"
    reader, found = EventReader(), []
    for start in range(0, len(data), size):
        found += reader.feed(data[start : start + size])
    assert found == [b"one", b"two", b"a\nb"]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8000", ("127.0.0.1", 8000, False, "")),
        ("localhost:8000/v1/", ("localhost", 8000, False, "")),
        ("https://example.com/models/v1", ("example.com", 443, True, "/models")),
        ("http://[::1]:9", ("::1", 9, False, "")),
    ],
)
def test_addresses(url: str, expected: tuple[str, int, bool, str]) -> None:
    found = ServerAddress.parse(url)
    assert (found.host, found.port, found.is_tls, found.prefix) == expected


@pytest.mark.parametrize(
    "url", ["ftp://a", "http://", "http://a:b", "http://user:word@a", "http://[::1", "/etc/passwd"]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="url: got"):
        HttpClient(url)


def test_connections_are_kept_and_replaced_when_the_server_closed_them() -> None:
    async def answer(path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(whole(body))
        if body == b"close":
            writer.close()

    async def run() -> None:
        async with fake_server(answer) as server:
            client = HttpClient(server.url, api_key="secret")
            for text in (b"a", b"b", b"close", b"c"):
                got, request = bytearray(), client.request("POST", "/x", [text])
                assert await client.send(request, lambda _, data, __, got=got: got.extend(data)) == 200
                assert got == text
                await asyncio.sleep(0.01)
            assert server.num_connections == 2
            assert b"\r\nAuthorization: Bearer secret\r\n" in server.heads[0]
            client.close()

    asyncio.run(run())


def test_an_answer_that_breaks_off_is_not_asked_for_again() -> None:
    async def answer(path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + b"5\r\nab")
        writer.close()

    async def run() -> None:
        async with fake_server(answer) as server:
            client = HttpClient(server.url)
            with pytest.raises(BrokenAnswerError, match="closed the connection early"):
                await client.get("/x")
            assert len(server.heads) == 1

    asyncio.run(run())


def test_nobody_listens() -> None:
    async def run() -> None:
        with pytest.raises(OSError, match=r"refused|Connect"):
            await HttpClient("http://127.0.0.1:1").get("/")

    asyncio.run(run())
