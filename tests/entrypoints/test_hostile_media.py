"""Media that lie, stall, swell or are broken, sent through HTTP: each refused with one sentence, and nothing is left.

The sources are a hostile server on the loopback, reached by a name that a resolver of the test's own knows.
"""

from __future__ import annotations

import base64
import gc
import json
import logging
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import PIL.Image
import pytest

from sensorium.media import EncodedMedia, MediaLimits, fetch
from sensorium.media.encode import encode_image
from tests.entrypoints.served import Served, served
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.waiting import HANG_S, until
from tests.media.hostile_server import FakeResolver, HostileServer
from tests.media.samples import clip, many_scans, sound
from tests.media.test_fuzz import damaged
from tests.media.test_image import png_claiming

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow and numpy warn about some of these

TIMEOUT_S = 1.0
"""Of fetches by the server that is in a hurry; the other one takes as long as it takes."""
LIMITS = MediaLimits(
    max_image_bytes=100_000,
    max_video_bytes=200_000,
    max_audio_bytes=200_000,
    max_image_pixels=1_000_000,
    max_video_frames=64,
    max_video_decoded_frames=200,
    max_video_frame_pixels=100_000,
    max_audio_s=5.0,
    max_audio_decoded_bytes=2_000_000,
    max_decode_s=HANG_S,
    max_redirects=2,
    image_fetch_timeout_s=HANG_S,
    video_fetch_timeout_s=HANG_S,
    audio_fetch_timeout_s=HANG_S,
)
SHORT_FETCHES = replace(
    LIMITS, image_fetch_timeout_s=TIMEOUT_S, video_fetch_timeout_s=TIMEOUT_S, audio_fetch_timeout_s=TIMEOUT_S
)
LEAKS = ("127.0.0.1", "10.0.0", "169.254", ".example", "Traceback", "httpx", "Errno", " 0x", "/etc", "/tmp", "\n")
KINDS = ("image", "video", "audio")
NAMES = {
    "media.example": [["127.0.0.1"]],
    "private.example": [["10.0.0.7"]],
    "metadata.example": [["169.254.169.254"]],
    "mixed.example": [["127.0.0.1", "10.0.0.7"]],
    "rebinding.example": [["127.0.0.1"], ["10.0.0.7"]],
    "mapped.example": [["::ffff:10.0.0.7"]],
}


@pytest.fixture(scope="module", autouse=True)
def no_records() -> Iterator[None]:
    """Pytest keeps log records, and with them the frames of errors; a server doesn't."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def hostile() -> Iterator[HostileServer]:
    server = HostileServer()
    yield server
    server.close()


@contextmanager
def serving(limits: MediaLimits) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "SystemResolver", lambda: FakeResolver(NAMES))
        flags = {"allowed_media_network": ("127.0.0.1/32",), "max_waiting_media_bytes": 1 << 20}
        with served(make_checkpoint("qwen2_5_omni_thinker"), flags, limits) as running:
            with httpx.Client(base_url=running.url, timeout=HANG_S, trust_env=False) as client:
                assert client.get("/health?generate=1").is_success
            yield running


@pytest.fixture(scope="module")
def server(hostile: HostileServer) -> Iterator[Served]:
    with serving(LIMITS) as running:
        yield running


@pytest.fixture(scope="module")
def server_in_a_hurry(hostile: HostileServer) -> Iterator[Served]:
    with serving(SHORT_FETCHES) as running:
        yield running
        is_clean(running)


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=HANG_S, trust_env=False) as client:
        yield client


@pytest.fixture(autouse=True)
def nothing_is_left(server: Served) -> Iterator[None]:
    """After each test: no request, no block, no byte of media, and an answer as good as ever."""
    yield
    is_clean(server)


def is_clean(server: Served) -> None:
    server.settle()
    # Threads of the pool may be at work for clients who are gone. Garbage is collected as the budget does it before
    # it refuses anyone.
    until(lambda: gc.collect() >= 0 and not server.engine.load().num_media_bytes, server.engine.load)


def chat_about(kind: str, url: str) -> dict[str, Any]:
    part = {"type": f"{kind}_url", f"{kind}_url": {"url": url}}
    return {"model": "tiny", "max_tokens": 2, "messages": [{"role": "user", "content": [part]}]}


def ask(client: httpx.Client, kind: str, url: str) -> httpx.Response:
    return client.post("/v1/chat/completions", json=chat_about(kind, url))


def refused(response: httpx.Response, status: int) -> str:
    """The sentence of a refusal, which says nothing of what lies behind it."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert isinstance(error["code"], str)
    message: str = error["message"]
    for leak in (
        "127.0.0.1",
        "10.0.0",
        "169.254",
        ".example",
        "Traceback",
        "httpx",
        "Errno",
        "0x",
        "/etc",
        "/tmp",
        "\n",
    ):
        assert leak not in message, message
    return message


def data_url(media_type: str, data: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


# Addresses


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["private.example", "metadata.example", "mixed.example", "mapped.example"])
def test_names_of_private_addresses(client: httpx.Client, hostile: HostileServer, kind: str, name: str) -> None:
    before = len(hostile.requests)
    assert "public internet" in refused(ask(client, kind, hostile.url("/ok", host=name)), 403)
    assert len(hostile.requests) == before, "nothing was asked"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "target",
    ["http://10.0.0.7/x", "http://169.254.169.254/latest", "http://[::1]/", "http://private.example/"],
)
def test_redirects_to_where_nobody_may_go(client: httpx.Client, hostile: HostileServer, kind: str, target: str) -> None:
    refused(ask(client, kind, hostile.url("/to/" + target.replace("/", "!"))), 403)
    assert "malformed" in refused(ask(client, kind, hostile.url("/to/file:!!!etc!passwd")), 400)


def test_a_loop_of_redirects(client: httpx.Client, hostile: HostileServer) -> None:
    before = len(hostile.requests)
    assert "redirects too often" in refused(ask(client, "image", hostile.url("/loop")), 424)
    assert len(hostile.requests) - before == LIMITS.max_redirects + 1


def test_a_name_that_changes_its_mind_is_looked_up_once(client: httpx.Client, hostile: HostileServer) -> None:
    """The first look-up is allowed and connected to; what the second would say never counts."""
    before = len(hostile.requests)
    refused(ask(client, "image", hostile.url("/ok", host="rebinding.example")), 415)  # it was fetched: no image
    assert len(hostile.requests) == before + 1
    refused(ask(client, "image", hostile.url("/ok", host="rebinding.example")), 403)
    assert len(hostile.requests) == before + 1


@pytest.mark.parametrize(
    "url",
    [
        "http://media.example\\@10.0.0.7/",
        "http://user:secret@media.example/",
        "http:///etc/passwd",
        "http://127.1/",
        "http://0x7f000001/",
        "ftp://media.example/",
        "file:///etc/passwd",
        "/etc/passwd",
        "../../etc/passwd",
        "javascript:alert(1)",
        "http://media.example:99999/",
        "http://" + "a" * 5000,
        "\x00",
        "",
    ],
)
def test_urls_that_no_two_parsers_read_alike(client: httpx.Client, url: str) -> None:
    response = ask(client, "image", url)
    assert response.status_code in (400, 403, 424), response.text
    refused(response, response.status_code)


# Bodies


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("endless", 413),
        ("endless-chunked", 413),
        ("claims-much", 413),
        ("claims-more", 424),
        ("garbage", 424),
        ("cut", 424),
    ],
)
def test_bodies_that_lie_or_never_end(
    client: httpx.Client, hostile: HostileServer, kind: str, path: str, status: int
) -> None:
    refused(ask(client, kind, hostile.url(f"/{path}")), status)


@pytest.mark.parametrize("path", ["slow", "slow-head", "endless-head"])
def test_one_deadline_however_the_time_is_spent(server_in_a_hurry: Served, hostile: HostileServer, path: str) -> None:
    """Without one for all of it, this would never end: every read brings something."""
    with httpx.Client(base_url=server_in_a_hurry.url, timeout=HANG_S, trust_env=False) as client:
        refused(ask(client, "video", hostile.url(f"/{path}")), 424)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("path", "status"), [("ok", 415), ("gzip", 415), ("status/404", 424), ("status/500", 424)])
def test_answers_that_are_no_media(
    client: httpx.Client, hostile: HostileServer, kind: str, path: str, status: int
) -> None:
    refused(ask(client, kind, hostile.url(f"/{path}")), status)


def begin_to_ask(server: Served, body: dict[str, Any]) -> socket.socket:
    """A connection on which a chat was asked for, and nothing is read."""
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection((host, int(port)))
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def test_slow_sources_delay_no_other_request(client: httpx.Client, hostile: HostileServer, server: Served) -> None:
    """They go on for as long as their clients wait."""
    before = len(hostile.requests)
    slow = [begin_to_ask(server, chat_about("image", hostile.url("/slow"))) for _ in range(12)]
    try:
        until(lambda: len(hostile.requests) >= before + 3)
        chat = {"model": "tiny", "max_tokens": 2, "messages": [{"role": "user", "content": "Hi"}]}
        assert client.post("/v1/chat/completions", json=chat).is_success
    finally:
        for connection in slow:
            connection.close()


def test_whoever_leaves_takes_the_fetch_along(server: Served, hostile: HostileServer) -> None:
    """Nothing else ends it: its source goes on for ever, and its deadline is far away."""
    before = len(hostile.requests)
    with begin_to_ask(server, chat_about("video", hostile.url("/slow"))):
        until(lambda: len(hostile.requests) > before)
    until(lambda: not server.server.server_state.tasks)
    server.settle()


def test_one_bad_item_gives_the_others_up(client: httpx.Client, hostile: HostileServer, server: Served) -> None:
    """A refusal doesn't wait for the fetches beside it, nor leave them to themselves: they would go on for ever."""
    urls = [("image", "http://private.example/"), ("video", hostile.url("/slow")), ("audio", hostile.url("/slow"))]
    parts = [{"type": f"{kind}_url", f"{kind}_url": {"url": url}} for kind, url in urls]
    body = {"model": "tiny", "messages": [{"role": "user", "content": parts}]}
    refused(client.post("/v1/chat/completions", json=body), 403)


# Contents


def test_bombs(client: httpx.Client) -> None:
    big = png_claiming(50_000, 50_000)
    swells = encode_image(PIL.Image.new("RGB", (1200, 1200)), "PNG")
    assert len(swells) < 20_000
    for data in (big, swells):
        assert "pixels" in refused(ask(client, "image", data_url("image/png", data)), 413)
    long = sound("mp3", 12.0)
    assert len(long) < LIMITS.max_audio_bytes
    refused(ask(client, "audio", data_url("audio/mpeg", long)), 413)
    frames = clip("mp4", 300)
    assert len(frames) < LIMITS.max_video_bytes
    refused(ask(client, "video", data_url("video/mp4", frames)), 413)
    packed = zlib.compress(bytes(10_000_000))
    refused(ask(client, "image", data_url("image/png", packed)), 415)


def test_one_kind_sent_as_another(client: httpx.Client) -> None:
    files = {"image": encode_image(PIL.Image.new("RGB", (40, 40))), "audio": sound("wav", 0.3)}
    for kind, other in (("image", "audio"), ("audio", "image"), ("video", "audio")):
        response = ask(client, kind, data_url("image/png", files[other]))
        assert response.status_code in (400, 413, 415), response.text
        refused(response, response.status_code)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_media_are_answered_or_refused(client: httpx.Client, kind: str) -> None:
    """Truncated, flipped, doubled and overwritten, as the decoders' own tests have them."""
    whole = {
        "image": encode_image(PIL.Image.new("RGB", (60, 40), "red")),
        "video": clip("mp4", 12),
        "audio": sound("ogg", 0.3),
    }
    statuses = []
    for data in list(damaged(whole[kind], seed=7))[:24]:
        response = ask(client, kind, data_url("application/octet-stream", data))
        statuses.append(response.status_code)
        if response.status_code != 200:
            assert response.status_code in (400, 413, 415), response.text
            refused(response, response.status_code)
    assert set(statuses) - {200}
    assert ask(client, kind, data_url("application/octet-stream", whole[kind])).is_success


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_pictures_of_odd_shapes_are_answered_or_refused(client: httpx.Client, size: tuple[int, int]) -> None:
    response = ask(client, "image", data_url("image/png", encode_image(PIL.Image.new("RGB", size))))
    if response.status_code != 200:
        assert "aspect ratio" in response.text


# Bytes in waiting


def test_media_that_wait_are_bounded_together(client: httpx.Client, hostile: HostileServer, server: Served) -> None:
    """Eight endless clips of up to 200,000 bytes each don't fit a million bytes: some are told to come later."""
    budget = server.engine._media_budget
    assert budget is not None
    held = budget.lease((1 << 20) - 50_000)
    try:
        response = ask(client, "video", hostile.url("/endless"))
        assert "waiting media" in refused(response, 429)
        assert response.headers["Retry-After"] == "2"
        inline = ask(client, "image", data_url("image/png", bytes(90_000)))
        assert "waiting media" in refused(inline, 429)
    finally:
        held.release()


def test_local_files_are_closed(client: httpx.Client, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(encode_image(PIL.Image.new("RGB", (40, 40))))
    for url in (str(path), f"file://{path}"):
        refused(ask(client, "image", url), 403)


@pytest.mark.parametrize("stream", [False, True])
def test_decoding_ends_when_its_client_goes(server: Served, stream: bool) -> None:
    """A picture of few bytes was decoded for minutes after its client had gone, and others waited for it."""
    loader = server.engine.preprocessor._collector._loader
    assert loader is not None
    pool = loader.decoders
    assert pool is not None
    about = chat_about("image", data_url("image/jpeg", many_scans(6_500, side=1_000)))
    body = json.dumps({**about, "stream": stream}).encode()
    port = int(server.url.rpartition(":")[2])
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", port)) as leaving:
        leaving.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: any(decoder.job for decoder in pool._decoders), lambda: pool._decoders)
    until(lambda: not any(decoder.job for decoder in pool._decoders), lambda: pool._decoders)
    assert pool.submit(EncodedMedia("image", encode_image(PIL.Image.new("RGB", (4, 4))))).result(HANG_S).size == (4, 4)  # type: ignore[union-attr]
