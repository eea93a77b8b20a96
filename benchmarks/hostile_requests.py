"""Requests that a server must refuse, survive or outlast. Each says what came of it: refused, outlasted, or wrong."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import struct
import zlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from benchmarks.good_requests import chat, clip, good_requests, picture, sound, text
from benchmarks.http_client import Connection
from sensorium.multimodal.media.encode import encode_audio, encode_image, encode_video

CHAT = "/v1/chat/completions"
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


async def _post(connection: Connection, body: bytes, *, may_succeed: bool = False) -> str:
    answer = await connection.request("POST", CHAT, body)
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
    """No JSON, or too deep."""
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


async def bomb(connection: Connection, index: int) -> str:
    """A picture that is small only while it is packed."""
    return await _post(connection, chat({"type": "image_url", "image_url": {"url": _BOMB_URL}}, text("What?")))


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


async def never_reads(connection: Connection, index: int) -> str:
    """Asks for a long answer with everything, and reads nothing for a while."""
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


async def half_a_request(connection: Connection, index: int) -> str:
    """Announces more than it sends, and hangs up."""
    try:
        async with asyncio.timeout(0.05):
            await connection.request("POST", CHAT, b"{", "Content-Length: 100000")
    except TimeoutError:
        pass
    connection.close()
    return "outlasted"


HOSTILE: tuple[Attack, ...] = (
    *(bad_field, bad_url, fuzzed, bad_body, leaves),
    *(bad_field, fuzzed, bomb, never_reads, half_a_request, bad_url),
)
