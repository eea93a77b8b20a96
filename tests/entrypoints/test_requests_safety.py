"""What clients may send: refused with one clear sentence, or answered; never a stall, a leak or a stack."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from sensorium.engine.async_llm_engine import AsyncLLMEngine
from sensorium.engine.core_supervisor import CoreSupervisor
from sensorium.entrypoints.openai import middleware
from tests.entrypoints.served import Served, data_url, served
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.mixed_requests import picture
from tests.helpers.waiting import HANG_S, auntil, until

KEYS = ("first-key", "second-key")
MAX_BODY_BYTES = 200_000
JSON = {"Content-Type": "application/json"}
JSON_LINE = "Content-Type: application/json\r\n"
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return make_checkpoint("qwen2_vl")


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Served]:
    bounds = {"max_body_bytes": MAX_BODY_BYTES, "max_waiting_bytes": 2 * MAX_BODY_BYTES}
    with served(checkpoint, {"api_key": KEYS, "allowed_origin": ("https://page.example",), **bounds}) as running:
        yield running


@pytest.fixture
def client(server: Served) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {KEYS[1]}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=HANG_S, trust_env=False) as client:
        yield client


def refused(response: httpx.Response, status: int, *texts: str) -> str:
    """The sentence of an error in OpenAI's form."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    for text in texts:
        assert text in error["message"]
    for leak in ("Traceback", "0x", "/opt", "/tmp", "site-packages", "pydantic"):
        assert leak not in response.text
    return str(error["message"])


# Fields


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"n": 10**6}, "n: got 1000000"),
        ({"n": 0}, "n: got 0"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature: got a value of type str, expected a number"),
        ({"top_p": 0}, "top_p"),
        ({"top_logprobs": 10**9, "logprobs": True}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 1e9}}, "logit_bias"),
        ({"logit_bias": {"999999999": 1}}, "logit_bias"),
        ({"stop": ["x"] * 1000}, "stop"),
        ({"presence_penalty": -1e30}, "presence_penalty"),
        ({"seed": 2**80}, "seed"),
        ({"response_format": {"type": "yaml"}}, "response_format.type: got 'yaml'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema: got nothing"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "response_format: got guided_regex too"),
        ({"structured_outputs": {"regex": "a", "json_object": True}}, "structured_outputs: got json_object and regex"),
        ({"structured_outputs": {"whitespace_pattern": "a"}}, "structured_outputs.whitespace_pattern: got a field"),
        ({"functions": [{"name": "f"}]}, "functions: got [{'name': 'f'}], expected null"),
        ({"made_up": 1}, "made_up: got a field that this server doesn't implement"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"mm_processor_kwargs": {"max_pixels": 10**9}}, "mm_processor_kwargs"),
        ({"priority": 5}, "priority"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages: got a value of type str, expected a list"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": 5}]}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "<|image_pad|>"}]}, "image"),
        ({"messages": [{"role": "user", "content": "x" * 50_000}]}, "too long"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:24],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_field_is_refused_by_name(client: httpx.Client, fields: dict[str, Any], text: str, stream: bool) -> None:
    refused(client.post("/v1/chat/completions", json={**CHAT, "stream": stream, **fields}), 400, text)


def test_options_of_a_stream_without_a_stream_are_refused(client: httpx.Client) -> None:
    body = {**CHAT, "stream_options": {"include_usage": True}}
    refused(client.post("/v1/chat/completions", json=body), 400, "stream_options")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(client: httpx.Client, value: str) -> None:
    body = json.dumps(CHAT)[:-1] + f', "temperature": {value}}}'
    refused(client.post("/v1/chat/completions", content=body, headers=JSON), 400)


def test_one_bad_input_refuses_the_embeddings_of_all(server: Served, client: httpx.Client) -> None:
    for body, text in (
        ({"input": ["fine", "x" * 5000]}, "too long"),
        ({"input": []}, "input: got 0"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "x", "dimensions": 3}, "dimensions"),
    ):
        refused(client.post("/v1/embeddings", json=body), 400, text)
    server.settle()


def test_tokens_there_and_back(client: httpx.Client) -> None:
    answer = client.post("/tokenize", json={"prompt": "Grüße"}).json()
    assert answer["count"] == len(answer["tokens"]) > 0
    assert client.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "Grüße"}
    refused(client.post("/detokenize", json={"tokens": [-1]}), 400, "tokens")
    refused(client.post("/tokenize", json={"prompt": "x" * 10**5}), 400, "too long")


def test_unknown_models_routes_and_methods(client: httpx.Client) -> None:
    refused(client.post("/v1/chat/completions", json={**CHAT, "model": "gpt"}), 404, "model: got 'gpt'")
    refused(client.get("/v1/models/gpt"), 404)
    refused(client.get("/v1/nothing"), 404)
    refused(client.get("/v1/chat/completions"), 405, "POST")


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b"null"])
def test_a_body_that_is_no_object_is_refused(client: httpx.Client, body: bytes) -> None:
    refused(client.post("/v1/chat/completions", content=body, headers=JSON), 400, "the body")


@pytest.mark.parametrize("depth", [40, 90_000])
def test_deep_nesting_is_refused(client: httpx.Client, depth: int) -> None:
    body = b'{"messages":' + b"[" * depth + b"]" * depth + b"}"
    refused(client.post("/v1/chat/completions", content=body, headers=JSON), 400, "nested too deeply")


# Media


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("http://127.0.0.1:1/a.png", 403),
        ("http://169.254.169.254/latest/meta-data", 403),
        ("file:///etc/passwd", 403),
        ("/etc/passwd", 403),
        ("data:image/png;base64,AAAA", 415),
        ("data:image/png;base64,@@@", 400),
    ],
)
def test_media_that_may_not_or_cannot_be_loaded(client: httpx.Client, url: str, status: int) -> None:
    part = {"type": "image_url", "image_url": {"url": url}}
    chat = {**CHAT, "messages": [{"role": "user", "content": [part]}]}
    response = client.post("/v1/chat/completions", json=chat)
    assert response.status_code in (status, 400), response.text
    assert "root:" not in refused(response, response.status_code)


def test_the_cost_of_a_chat_is_what_it_then_takes(client: httpx.Client) -> None:
    image = {"type": "image_url", "image_url": {"url": data_url(picture(1))}}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": "What?"}]}]
    cost = client.post("/v1/chat/token_cost", json={"messages": messages}).json()
    answer = client.post("/v1/chat/completions", json={**CHAT, "messages": messages}).json()
    assert cost["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    (image_tokens,) = cost["media_tokens"]["image"]
    assert 1 < image_tokens < cost["prompt_tokens"]
    assert client.get("/metrics").text.count("sensorium_requests_total") >= 1


# Keys


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/version", "/nothing", "/health/", "//health", "/docs"])
@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", f"Basic {KEYS[0]}", KEYS[0], "Bearer first-key2"])
def test_nothing_but_health_is_open(server: Served, path: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    response = httpx.get(server.url + path, headers=headers, trust_env=False, timeout=HANG_S)
    refused(response, 401, "API key")
    assert all(key not in response.text for key in KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_every_key_opens(server: Served, key: str) -> None:
    assert httpx.get(
        server.url + "/version", headers={"Authorization": f"Bearer {key}"}, trust_env=False, timeout=HANG_S
    ).is_success


def test_health_is_open_and_can_make_a_token(server: Served) -> None:
    for path in ("/health", "/ping", "/health?generate=1"):
        assert httpx.get(server.url + path, trust_env=False, timeout=HANG_S).status_code == 200


def test_many_who_ask_for_a_token_at_once_get_one(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The route is open, so it must not be a way to keep the model busy."""
    checks = []
    check = server.engine.check_health

    async def slow(**options: Any) -> None:
        checks.append(options)
        await auntil(lambda: len(server.server.server_state.tasks) >= 8)  # all of them are being answered
        await check(**options)

    monkeypatch.setattr(server.engine, "check_health", slow)
    url = f"{server.url}/health?generate=1"
    threads = [
        threading.Thread(target=httpx.get, args=(url,), kwargs={"trust_env": False, "timeout": HANG_S})
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(checks) < 4


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch, server: Served) -> None:
    compared = []
    compare = middleware.hmac.compare_digest

    def count(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return compare(a, b)

    monkeypatch.setattr(middleware.hmac, "compare_digest", count)
    for token in (KEYS[0], "x", "y" * 1000):
        httpx.get(
            server.url + "/version", headers={"Authorization": f"Bearer {token}"}, trust_env=False, timeout=HANG_S
        )
    assert compared == [(32, 32)] * 2 * 3, "each key every time, digests of one length"


def test_a_browsers_preflight_needs_no_key_and_only_the_named_origin_passes(server: Served) -> None:
    def preflight(origin: str) -> httpx.Response:
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        return httpx.request(
            "OPTIONS", server.url + "/v1/chat/completions", headers=headers, trust_env=False, timeout=HANG_S
        )

    allowed = preflight("https://page.example")
    assert allowed.headers["access-control-allow-origin"] == "https://page.example"
    assert "access-control-allow-origin" not in preflight("https://other.example").headers


def test_request_ids_come_back_unless_they_are_odd(client: httpx.Client) -> None:
    assert client.get("/version", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert client.get("/version", headers={"X-Request-Id": "a b\tc"}).headers["x-request-id"] != "a b\tc"


# Bounds


def raw(server: Served, request: bytes) -> bytes:
    address = server.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1])), timeout=HANG_S) as connection:
        connection.sendall(request)
        return connection.recv(65536)


def test_a_body_over_the_bound_is_refused_before_it_is_read(server: Served, client: httpx.Client) -> None:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS[0]}\r\n{JSON_LINE}"
    declared = raw(server, f"{head}Content-Length: {MAX_BODY_BYTES + 1}\r\n\r\n".encode())
    assert b" 413 " in declared.split(b"\r\n")[0]

    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 10_000

    refused(client.post("/v1/completions", content=endless(), headers=JSON), 413, "max_body_bytes")


def test_bodies_that_wait_are_bounded_together(server: Served, client: httpx.Client) -> None:
    address = server.url.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS[0]}\r\n{JSON_LINE}"
    size = MAX_BODY_BYTES - 1000
    waiting = []
    try:
        for _ in range(2):
            connection = socket.create_connection((address[0], int(address[1])), timeout=HANG_S)
            waiting.append(connection)
            connection.sendall(f"{head}Content-Length: {size}\r\n\r\n".encode() + b"x" * (size - 1))
        own = {**JSON, "Authorization": f"Bearer {KEYS[0]}"}
        until(lambda: client.post("/v1/completions", content=b" " * 10_000, headers=own).status_code == 503)
        response = client.post("/v1/completions", content=b" " * 10_000, headers=own)
        refused(response, 503, "waiting request bodies")
        assert int(response.headers["Retry-After"]) >= 1
        another = client.post("/v1/completions", content=b" " * 10_000, headers=JSON)
        refused(another, 400)  # read, though it is no JSON: another key has its share
    finally:
        for connection in waiting:
            connection.close()
    until(lambda: client.post("/v1/chat/completions", json=CHAT).is_success, "what was given up is not free again")


def test_huge_headers_are_refused(server: Served) -> None:
    answer = raw(server, b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 200_000)
    assert b" 4" in answer.split(b"\r\n")[0] or answer == b""


def test_requests_beyond_the_waiting_line_get_429(checkpoint: Path) -> None:
    with served(checkpoint, max_waiting_requests=2, max_num_seqs=1) as running:
        statuses: list[tuple[int, str | None]] = []

        def ask() -> None:
            body = {**CHAT, "max_tokens": 100, "ignore_eos": True}
            response = httpx.post(running.url + "/v1/chat/completions", json=body, timeout=HANG_S, trust_env=False)
            statuses.append((response.status_code, response.headers.get("Retry-After")))

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        codes = [code for code, _ in statuses]
        assert set(codes) == {200, 429}
        assert all(after == "1" for code, after in statuses if code == 429)
        running.settle()


# Many at once


def test_good_answers_are_the_same_among_hostile_requests_and_disconnects(server: Served, client: httpx.Client) -> None:
    good = {**CHAT, "temperature": 0, "max_tokens": 20, "ignore_eos": True}
    quiet = client.post("/v1/chat/completions", json=good).json()["choices"][0]["message"]["content"]
    answers: list[str] = []
    bad = ({"n": -1}, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]})

    def attack(index: int) -> None:
        own = httpx.Client(base_url=server.url, headers=client.headers, trust_env=False, timeout=HANG_S)
        with own:
            if index % 4 == 0:
                answers.append(own.post("/v1/chat/completions", json=good).json()["choices"][0]["message"]["content"])
            elif index % 4 == 1:
                assert own.post("/v1/chat/completions", json={**CHAT, **bad[index % 8 == 1]}).status_code < 500
            else:
                long = {**CHAT, "max_tokens": 500, "stream": True, "ignore_eos": True}
                with own.stream("POST", "/v1/chat/completions", json=long) as response:
                    next(response.iter_lines())

    for _ in range(2):
        threads = [threading.Thread(target=attack, args=(index,)) for index in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == [quiet] * 16
    server.settle()


def test_a_reader_who_never_reads_stalls_nobody(server: Served, client: httpx.Client) -> None:
    address = server.url.removeprefix("http://").split(":")
    body = json.dumps({**CHAT, "max_tokens": 900, "stream": True, "ignore_eos": True, "logprobs": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS[0]}\r\n{JSON_LINE}"
    stuck = socket.socket()
    stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with stuck:
        stuck.connect((address[0], int(address[1])))
        stuck.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        for _ in range(3):
            assert client.post("/v1/chat/completions", json=CHAT).is_success
    server.settle()


def test_the_death_of_the_engine_is_told(checkpoint: Path) -> None:
    with served(checkpoint) as running:
        client = httpx.Client(base_url=running.url, timeout=HANG_S, trust_env=False)
        with client, client.stream("POST", "/v1/chat/completions", json=_long()) as response:
            lines = response.iter_lines()
            next(lines)
            running.loop.call_soon_threadsafe(_kill, running.engine)
            rest = "\n".join(lines)
            assert "server_error" in rest
            assert "data: [DONE]" in rest
            for path in ("/health", "/ping"):
                refused(httpx.get(running.url + path, trust_env=False, timeout=HANG_S), 503, "has ended")
            refused(
                httpx.post(running.url + "/v1/chat/completions", json=CHAT, trust_env=False, timeout=HANG_S),
                503,
                "has ended",
            )


def test_a_new_engine_takes_the_place_of_a_dead_one(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_restart, restart = threading.Event(), CoreSupervisor._restart

    async def held(supervisor: CoreSupervisor) -> None:
        await asyncio.to_thread(may_restart.wait, HANG_S)
        await restart(supervisor)

    monkeypatch.setattr(CoreSupervisor, "_restart", held)
    with (
        served(checkpoint, {"restart_core": 1}) as running,
        httpx.Client(base_url=running.url, timeout=HANG_S) as client,
    ):
        with client.stream("POST", "/v1/chat/completions", json=_long()) as response:
            lines = response.iter_lines()
            next(lines)
            running.loop.call_soon_threadsafe(_kill, running.engine)
            assert "is being started anew" in "\n".join(lines)
        answer = client.post("/v1/chat/completions", json=CHAT)
        refused(answer, 503, "is being started anew")
        assert 1 <= int(answer.headers["Retry-After"]) <= 60
        refused(client.get("/health"), 503, "is being started anew")
        may_restart.set()
        until(lambda: client.get("/health").is_success)
        assert client.post("/v1/chat/completions", json=CHAT).is_success
        assert "sensorium_core_restarts_total 1.0" in client.get("/metrics").text


def _long() -> dict[str, Any]:
    return {**CHAT, "max_tokens": 900, "stream": True, "ignore_eos": True}


def _kill(engine: AsyncLLMEngine) -> None:
    engine._core._client._closed()  # what the channel calls when the other end is gone
