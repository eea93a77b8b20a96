"""Web pages that nobody let in: those that send blindly, and those whose name was made to mean this machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from sensorium.entrypoints.openai.server_args import ServerArgs
from tests.entrypoints.served import Served, served
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.waiting import HANG_S

BODY: dict[str, Any] = {"prompt": "Hi"}
TEXT = '{"prompt": "Hi"}'
PAGE = "https://page.example"


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(make_checkpoint("llama"), {"allowed_origin": (PAGE,), "allowed_host": ("Box.Example",)}) as running:
        yield running


@pytest.fixture
def client(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, trust_env=False, timeout=HANG_S) as client:
        yield client


def refused(response: httpx.Response, status: int) -> str:
    """The sentence of an error in OpenAI's form."""
    assert response.status_code == status, response.text
    assert isinstance(response.json()["error"]["code"], str)
    assert response.headers["X-Request-Id"]
    return str(response.json()["error"]["message"])


# What a page may send without asking


@pytest.mark.parametrize(
    "kind",
    [None, "text/plain", "text/plain;application/json", "application/x-www-form-urlencoded", "application/jsonp"],
)
@pytest.mark.parametrize("path", ["/tokenize", "/v1/chat/completions", "/v1/responses", "/v1/embeddings"])
def test_a_body_that_is_not_said_to_be_json_is_refused(client: httpx.Client, path: str, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    message = refused(client.post(path, content=TEXT, headers=headers), 415)
    assert "curl: -H 'Content-Type: application/json'" in message
    assert f"got {'none' if kind is None else repr(kind)}, expected" in message


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", "Application/JSON;x=y"])
def test_json_by_any_spelling_is_taken(client: httpx.Client, kind: str) -> None:
    assert client.post("/tokenize", content=TEXT, headers={"Content-Type": kind}).is_success


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1:1", "http://localhost", f"{PAGE}.evil.example", ""]
)
@pytest.mark.parametrize("path", ["/tokenize", "/v1/audio/transcriptions", "/ping", "/nothing"])
def test_pages_of_other_origins_are_refused_everywhere(client: httpx.Client, origin: str, path: str) -> None:
    message = refused(client.post(path, json=BODY, headers={"Origin": origin}), 403)
    assert "--allowed-origin" in message


def test_a_foreign_page_gets_no_leave_to_ask(client: httpx.Client) -> None:
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    response = client.options("/tokenize", headers=headers)
    refused(response, 403)
    assert "access-control-allow-origin" not in response.headers


def test_the_servers_own_page_and_one_that_was_let_in_pass(server: Served, client: httpx.Client) -> None:
    own = server.url
    behind_tls = own.replace("http:", "https:")
    for origin in (own, own.upper(), behind_tls, PAGE):
        assert client.post("/tokenize", json=BODY, headers={"Origin": origin}).is_success, origin
    ask = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    assert client.options("/tokenize", headers=ask).headers["access-control-allow-origin"] == PAGE


# Names that are made to mean this machine


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example"]
)
@pytest.mark.parametrize("path", ["/", "/v1/models", "/health"])
def test_a_name_that_is_not_the_servers_is_refused(client: httpx.Client, host: str, path: str) -> None:
    assert "--allowed-host" in refused(client.get(path, headers={"Host": host}), 403)


def test_a_page_whose_name_was_bound_anew_is_refused_though_it_is_of_one_origin(client: httpx.Client) -> None:
    headers = {"Host": "evil.example:8000", "Origin": "http://evil.example:8000"}
    refused(client.post("/tokenize", json=BODY, headers=headers), 403)


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:1234", "127.0.0.1", "127.0.0.1:9", "[::1]", "[::1]:8000", "10.0.0.7:80", "box.example:8"],
)
def test_own_names_and_addresses_pass(client: httpx.Client, host: str) -> None:
    """No address can be bound anew; it may be that of a tunnel's other end."""
    assert client.get("/v1/models", headers={"Host": host}).is_success


def test_with_keys_it_is_the_key_that_counts() -> None:
    headers = {"Host": "proxy.example", "Origin": "app://notes", "Authorization": "Bearer secret"}
    with served(make_checkpoint("llama"), {"api_key": ("secret",)}) as running:
        url = f"{running.url}/tokenize"
        assert httpx.post(url, json=BODY, headers=headers, trust_env=False, timeout=HANG_S).is_success
        refused(
            httpx.post(url, json=BODY, headers={**headers, "Authorization": ""}, trust_env=False, timeout=HANG_S), 401
        )
        refused(httpx.post(url, content=TEXT, headers=headers, trust_env=False, timeout=HANG_S), 415)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, ()),
        ({"host": "::1"}, ()),
        ({"host": "localhost", "allowed_host": ("box",)}, ("box",)),
        ({"host": "0.0.0.0"}, None),
        ({"host": "0.0.0.0", "allowed_host": ("box",)}, ("box",)),
        ({"api_key": ("k",)}, None),
        ({"host": "box"}, None),
    ],
)
def test_names_are_held_to_on_the_loopback_without_keys_or_when_given(
    settings: dict[str, Any], names: tuple[str, ...] | None
) -> None:
    assert ServerArgs(**settings).host_names == names
