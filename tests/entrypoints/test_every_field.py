"""Values of every other type in every field of every body, and what all error replies have in common."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest

from sensorium.entrypoints.openai import protocol
from sensorium.entrypoints.openai.pooling import bodies
from tests.entrypoints.served import Served, served
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.waiting import HANG_S

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
BODIES = {
    "/v1/chat/completions": (protocol.ChatBody, CHAT),
    "/v1/completions": (protocol.CompletionBody, {"prompt": "Hi", "max_tokens": 1}),
    "/v1/embeddings": (bodies.EmbeddingBody, {"input": "Hi"}),
    "/classify": (bodies.ClassifyBody, {"input": "Hi"}),
    "/pooling": (bodies.PoolingBody, {"input": "Hi"}),
    "/score": (bodies.ScoreBody, {"text_1": "Hi", "text_2": "Ho"}),
    "/rerank": (bodies.RerankBody, {"query": "Hi", "documents": ["Ho"]}),
    "/v1/chat/token_cost": (protocol.TokenCostBody, {"messages": CHAT["messages"]}),
    "/tokenize": (protocol.TokenizeBody, {"prompt": "Hi"}),
    "/detokenize": (protocol.DetokenizeBody, {"tokens": [65]}),
}
FIELDS = [(path, name) for path, (kind, _) in BODIES.items() for name in kind.model_fields]
VALUES = (True, -1, 2**70, 1e308, "", "\ud7ff\x00", [], [[[]]], [None], {}, {"": {"a": [1]}}, [{"type": 5}], ["x", 1])
LEAK = re.compile(r"Traceback|0x[0-9a-f]{6}|/root|/tmp|/home|/usr|site-packages|pydantic|127\.0\.0\.1|Errno|object at")


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with served(make_checkpoint("qwen2_vl")) as running, httpx.Client(base_url=running.url, timeout=HANG_S) as client:
        yield client
        _settle(running, client)


def _settle(running: Served, client: httpx.Client) -> None:
    assert client.get("/health?generate=1").is_success
    running.settle()


def check_error(response: httpx.Response) -> None:
    """An error in OpenAI's form, in one sentence or a few, that tells nothing of what is inside."""
    assert 400 <= response.status_code < 500, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["code"], str)
    assert error["code"]
    assert 10 < len(error["message"]) < 2000
    assert not LEAK.search(response.text), response.text


@pytest.mark.parametrize(("path", "name"), FIELDS)
def test_no_value_of_another_type_is_an_internal_error(client: httpx.Client, path: str, name: str) -> None:
    statuses = set()
    for value in VALUES:
        response = client.post(path, json={**BODIES[path][1], name: value})
        statuses.add(response.status_code)
        if response.status_code != 200:
            check_error(response)
    assert statuses - {200}


@pytest.mark.parametrize("path", BODIES)
def test_what_is_missing_or_made_up_is_named(client: httpx.Client, path: str) -> None:
    response = client.post(path, json={**BODIES[path][1], "made_up": 1})
    check_error(response)
    assert "made_up" in response.text
    response = client.post(path, json={})
    check_error(response)


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
@pytest.mark.parametrize(
    "path", ["/nothing", "/v1", "/v1/chat/completions", "/v1/../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd"]
)
def test_other_routes_and_methods(client: httpx.Client, method: str, path: str) -> None:
    response = client.request(method, path)
    assert response.status_code in (404, 405)
    check_error(response)
