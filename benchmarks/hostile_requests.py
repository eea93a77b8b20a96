"""Requests that a server must refuse, survive or outlast. Each returns the outcome: refused, outlasted, or wrong."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import struct
import zlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from PIL import Image

from benchmarks.good_requests import chat, clip, good_requests, picture, sound, text
from benchmarks.http_client import Connection
from sensorium.media.encode import encode_audio, encode_image, encode_video

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
Attack = Callable[[Connection, int], Awaitable[str]]
LEAKS = (b"Traceback", b"0x", b"/root", b"/tmp", b"/home", b"site-packages", b"127.0.0.1", b"Errno")

FIELDS: Sequence[dict[str, Any]] = (
    {"n": 10**6},
    {"temperature": -1},
    {"temperature": "hot"},
    {"top_p": 7},
    {"logit_bias": {"99999999": 1}},
    {"max_tokens": -3},
    {"stop": ["x"] * 1000},
    {"seed": 2**90},
    {"made_up": True},
    {"priority": -5},
    {"tools": [{}] * 1000},
    {"messages": [{"role": "x" * 1000, "content": "x"}]},
    {"messages": [{"role": f"role{index}", "content": "x"} for index in range(100)]},
    {"messages": 5},
    {"messages": [{"role": "user", "content": "<|IMAGE|>"}]},
    {"messages": [{"role": "user", "content": "x" * 100_000}]},
    {"chat_template": "{% for i in range(10**9) %}{% endfor %}"},
)
URLS = (
    "http://169.254.169.254/latest/meta-data",
    "http://127.0.0.1:22/x.png",
    "http://[::ffff:10.0.0.1]/x.png",
    "http://user@10.0.0.1\\@example.com/",
    "file:///etc/passwd",
    "gopher://127.0.0.1/",
    "data:image/png;base64,@@@",
)


MANY = 20_000
MISTAKES: Sequence[tuple[str, bytes]] = (
    (COMPLETIONS, b'{"prompt":[' + b"{}," * MANY + b"{}]}"),
    (COMPLETIONS, b'{"prompt":"x","logit_bias":{' + b",".join(b'"a%d":"b"' % i for i in range(MANY)) + b"}}"),
    (CHAT, b'{"messages":[' + b'{"role":1},' * MANY + b"{}]}"),
    (CHAT, b'{"messages":[],' + b",".join(b'"a%d":1' % i for i in range(MANY)) + b"}"),
    ("/v1/responses", b'{"input":[' + b'{"type":"message"},' * MANY + b"{}]}"),
    ("/v1/embeddings", b'{"input":[' + b"[null]," * MANY + b"[]]}"),
    (CHAT, b'{"messages":[' + b"[]," * 1_100_000 + b"[]]}"),
)
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
AMBIGUOUS = (
    HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{} ",
    HEAD + b"Content-Length: 2\nX-A: b\r\n\r\n{}",
    HEAD + b"Content-Length:\r\n 2\r\n\r\n{}",
    HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n0x2\r\n{}\r\n0\r\n\r\n",
    HEAD + b"X-A: \x1b[2J\r\nContent-Length: 2\r\n\r\n{}",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 12_000,
)


async def _post(connection: Connection, body: bytes, *, path: str = CHAT, may_succeed: bool = False) -> str:
    answer = await connection.request("POST", path, body)
    if answer.status == 200 and may_succeed:
        return "answered"
    is_refused = 400 <= answer.status < 500 and not any(leak in answer.body for leak in LEAKS)
    return "refused" if is_refused else "wrong"


async def bad_field(connection: Connection, index: int) -> str:
    """A field out of bounds."""
    body = {**json.loads(good_requests()[0]), **FIELDS[index % len(FIELDS)]}
    return await _post(connection, json.dumps(body).encode())


async def bad_url(connection: Connection, index: int) -> str:
    """An address that may not be fetched."""
    part = {"type": "image_url", "image_url": {"url": URLS[index % len(URLS)]}}
    return await _post(connection, chat(part, text("What?")))


async def bad_body(connection: Connection, index: int) -> str:
    """A body that isn't JSON, or is nested too deeply."""
    bodies = (b"{", b"\xff\xfe", b"[" * 5000, b'{"messages":' + b"[" * 200 + b"]" * 200 + b"}", b"null")
    return await _post(connection, bodies[index % len(bodies)])


def _damaged(data: bytes, rng: random.Random) -> bytes:
    copy = bytearray(data)
    for _ in range(rng.randrange(1, 30)):
        copy[rng.randrange(len(copy))] = rng.randrange(256)
    return bytes(copy[: rng.randrange(1, len(copy))] if rng.random() < 0.3 else copy)


_FILES = {
    "image": ("image/png", encode_image(picture(1))),
    "video": ("video/mp4", encode_video(clip(1), 4.0, "mp4")),
    "audio": ("audio/ogg", encode_audio(sound(1), 16_000, "ogg")),
}


async def fuzzed(connection: Connection, index: int) -> str:
    """A picture, clip or sound with damage; some still decode."""
    rng = random.Random(index)
    kind = rng.choice(sorted(_FILES))
    media_type, data = _FILES[kind]
    url = f"data:{media_type};base64,{base64.b64encode(_damaged(data, rng)).decode()}"
    part = {"type": f"{kind}_url", f"{kind}_url": {"url": url}}
    return await _post(connection, chat(part, text("What?"), max_tokens=2), may_succeed=True)


def _bomb() -> bytes:
    """A PNG of 50,000 x 50,000 pixels in a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
        + chunk(b"IEND", b"")
    )


_BOMB_URL = "data:image/png;base64," + base64.b64encode(_bomb()).decode()


async def bomb(connection: Connection, _index: int) -> str:
    """A picture that is small only while it is compressed."""
    return await _post(connection, chat({"type": "image_url", "image_url": {"url": _BOMB_URL}}, text("What?")))


def _much_work(num_scans: int) -> bytes:
    """A progressive JPEG whose last scan is repeated many times."""
    data = encode_image(Image.new("L", (4_000, 4_000), 128), "JPEG", progressive=True, quality=5)
    begin, end = data.rfind(b"\xff\xda"), data.rfind(b"\xff\xd9")
    return data[:begin] + data[begin:end] * num_scans + data[end:]


def _box(kind: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I", 8 + len(body)) + kind + body


def _edited(num_edits: int) -> bytes:
    """A clip whose edit list repeats its samples."""
    sizes = _box(b"stsz", struct.pack(">III", 0, 1, 100_000))
    edits = _box(b"elst", struct.pack(">II", 0, num_edits), struct.pack(">IiHH", 90_000, 0, 1, 0) * num_edits)
    media = _box(b"mdia", _box(b"minf", _box(b"stbl", sizes)))
    return _box(b"ftyp", b"isom\0\0\0\0isom") + _box(b"moov", _box(b"trak", _box(b"edts", edits), media))


async def much_work(connection: Connection, index: int) -> str:
    """A picture of few bytes that takes minutes to decode, and whose sender disconnects."""
    url = "data:image/jpeg;base64," + base64.b64encode(_much_work(2_000 + index)).decode()
    body = chat({"type": "image_url", "image_url": {"url": url}}, text("What?"))
    try:
        async with asyncio.timeout(random.Random(index).uniform(0.1, 1.0)):
            await connection.request("POST", CHAT, body)
    except TimeoutError:
        pass
    connection.close()
    return "outlasted"


async def edited(connection: Connection, index: int) -> str:
    """A clip of a few kilobytes that becomes gigabytes of tables."""
    url = "data:video/mp4;base64," + base64.b64encode(_edited(300 + index)).decode()
    return await _post(connection, chat({"type": "video_url", "video_url": {"url": url}}, text("What?")))


async def leaves(connection: Connection, index: int) -> str:
    """Hangs up in the middle of an answer."""
    body = json.dumps({**json.loads(good_requests()[index % 16]), "stream": True, "max_tokens": 300}).encode()
    try:
        async with asyncio.timeout(random.Random(index).uniform(0, 0.5)):
            async for _ in connection.stream(CHAT, body):
                pass
    except TimeoutError:
        pass
    connection.close()
    return "outlasted"


async def never_reads(connection: Connection, _index: int) -> str:
    """Asks for a long answer with all options, and reads nothing for a while."""
    body = json.loads(good_requests()[0])
    body |= {"stream": True, "max_tokens": 400, "logprobs": True, "top_logprobs": 5}
    stream = connection.stream(CHAT, json.dumps(body).encode())
    try:
        await asyncio.wait_for(anext(stream), 60)
        await asyncio.sleep(0.3)
    finally:
        connection.close()
        await stream.aclose()  # type: ignore[attr-defined]
    return "outlasted"


async def half_a_request(connection: Connection, _index: int) -> str:
    """Announces more than it sends, and hangs up."""
    try:
        async with asyncio.timeout(0.05):
            await connection.request("POST", CHAT, b"{", "Content-Length: 100000")
    except TimeoutError:
        pass
    connection.close()
    return "outlasted"


async def many_mistakes(connection: Connection, index: int) -> str:
    """A body in which everything is wrong, or that has very many elements."""
    path, body = MISTAKES[index % len(MISTAKES)]
    return await _post(connection, body, path=path)


async def ambiguous(connection: Connection, index: int) -> str:
    """An ambiguous request, which two parsers would read differently, followed by another request."""
    got = await connection.raw(AMBIGUOUS[index % len(AMBIGUOUS)] + b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    is_refused = got.count(b"HTTP/1.1 ") == 1 and got.startswith((b"HTTP/1.1 400", b"HTTP/1.1 501"))
    return "refused" if is_refused else "wrong"


async def forged_line(connection: Connection, index: int) -> str:
    """A path that contains a forged line of a log."""
    answer = await connection.request("GET", f"/%0A2026-01-01%2000:00:00,000%20INFO%20forged%1B[2J{index}")
    return "refused" if answer.status == 404 else "wrong"


async def half_a_head(connection: Connection, _index: int) -> str:
    """Connections that send half a request, and no more."""
    held = [asyncio.create_task(connection.raw(HEAD + b"X-A: ")) for _ in range(8)]
    await asyncio.sleep(0.2)
    for each in held:
        each.cancel()
    await asyncio.gather(*held, return_exceptions=True)
    return "outlasted"


async def floods(connection: Connection, index: int) -> str:
    """Asks for very many outputs at once, and hangs up after a while."""
    body = {"prompt": ["once"] * 2, "n": 64, "max_tokens": 100, "stream": True}
    try:
        async with asyncio.timeout(random.Random(index).uniform(0, 0.5)):
            async for _ in connection.stream(COMPLETIONS, json.dumps(body).encode()):
                pass
    except TimeoutError:
        pass
    connection.close()
    return "outlasted"


HOSTILE: tuple[Attack, ...] = (
    *(bad_field, bad_url, fuzzed, bad_body, leaves),
    *(bad_field, fuzzed, bomb, never_reads, half_a_request, bad_url),
    *(many_mistakes, ambiguous, forged_line, half_a_head, floods, many_mistakes, much_work, edited),
)
