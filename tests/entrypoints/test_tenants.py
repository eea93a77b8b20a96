"""API keys apart: what one has asked can't be found out by another, nor does one's work stand before another's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.entrypoints.served import Served, data_url, served
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.mixed_requests import picture
from tests.helpers.waiting import HANG_S

KEYS = ("key-a", "key-b")
SECRET = "The launch code is 7-4-1-9, and the meeting is at noon on Friday. " * 4
IMAGE = {"type": "image_url", "image_url": {"url": data_url(picture(3))}}


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return make_checkpoint("qwen2_vl")


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Served]:
    with served(checkpoint, {"api_key": KEYS}, max_num_seqs=4) as running:
        yield running


def post(server: Served, key: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {key}"}
    response = httpx.post(server.url + path, json=body, headers=headers, timeout=HANG_S, trust_env=False)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def completion(server: Served, key: str, text: str, **fields: Any) -> int:
    body = {"prompt": text + SECRET, "max_tokens": 1, **fields}
    usage = post(server, key, "/v1/completions", body)["usage"]
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def chat(server: Served, key: str, text: str, **fields: Any) -> int:
    messages = [{"role": "user", "content": text + SECRET}]
    usage = post(server, key, "/v1/chat/completions", {"messages": messages, "max_tokens": 1, **fields})["usage"]
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def picture_chat(server: Served, key: str, text: str, **fields: Any) -> int:
    messages = [{"role": "user", "content": [IMAGE, {"type": "text", "text": text + SECRET}]}]
    usage = post(server, key, "/v1/chat/completions", {"messages": messages, "max_tokens": 1, **fields})["usage"]
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def response(server: Served, key: str, text: str, **fields: Any) -> int:
    body = {"input": text + SECRET, "max_output_tokens": 1, "store": False, **fields}
    return int(post(server, key, "/v1/responses", body)["usage"]["input_tokens_details"]["cached_tokens"])


ROUTES = [completion, chat, picture_chat, response]


@pytest.mark.parametrize("cached", ROUTES)
def test_cached_tokens_tell_no_key_what_another_has_asked(server: Served, cached: Callable[..., int]) -> None:
    text = f"{cached.__name__}: "
    before = cached(server, "key-a", text)
    assert cached(server, "key-a", text) > before + 100, "a key's own prompts stay cached"
    assert cached(server, "key-b", text) <= before
    assert cached(server, "key-b", text) > before + 100


@pytest.mark.parametrize("cached", ROUTES)
def test_a_salt_sets_apart_within_a_key_and_joins_no_keys(server: Served, cached: Callable[..., int]) -> None:
    one, other = f"one of {cached.__name__}", f"other of {cached.__name__}"
    assert cached(server, "key-a", "Second: ", cache_salt=one) == 0
    assert cached(server, "key-a", "Second: ", cache_salt=one) > 100
    assert cached(server, "key-a", "Second: ", cache_salt=other) == 0
    assert cached(server, "key-b", "Second: ", cache_salt=one) == 0


def test_mapped_pictures_are_apart_too(server: Served) -> None:
    def num_hits() -> int:
        return server.engine.preprocessor.statistics().hits

    body = {"messages": [{"role": "user", "content": [IMAGE, {"type": "text", "text": "Third"}]}]}
    for path in ("/v1/chat/completions", "/v1/chat/token_cost"):
        sent = {**body, "max_tokens": 1, "cache_salt": "own"} if path.endswith("completions") else body
        post(server, "key-a", path, sent)
        before = num_hits()
        post(server, "key-a", path, sent)
        assert num_hits() == before + 1
    hits = num_hits()
    post(server, "key-b", "/v1/chat/completions", {**body, "max_tokens": 1, "cache_salt": "own"})
    assert num_hits() == hits


def test_pictures_are_decoded_anew_for_another_key(server: Served) -> None:
    """Decoding takes long enough for a stop watch."""
    url = data_url(picture(9))
    body = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}
    cache = server.engine.preprocessor._collector._loader.cache  # type: ignore[union-attr]
    counts = []
    for key in ("key-a", "key-b", "key-a"):
        post(server, key, "/v1/chat/token_cost", body)
        counts.append(cache.stats().misses)
    assert counts[0] < counts[1] == counts[2]


@pytest.mark.parametrize(
    ("settings", "headers"),
    [({"api_key": KEYS, "share_caches": True}, True), ({}, False)],
    ids=["the operator joins them", "there are no keys"],
)
def test_caches_are_shared_where_the_operator_says_so(
    checkpoint: Path, settings: dict[str, Any], headers: bool
) -> None:
    with served(checkpoint, settings) as running:
        assert completion(running, "key-a", "") == 0
        assert completion(running, "key-b", "") > 0
        assert completion(running, "key-b", "", cache_salt="x") == 0


def test_one_body_does_not_stand_before_another_keys_request(server: Served) -> None:
    flood = {"prompt": ["once"] * 4, "n": 64, "max_tokens": 40, "ignore_eos": True, "stream": True}
    headers = {"Authorization": "Bearer key-b"}
    ended = threading.Event()

    def ask() -> None:
        with httpx.stream(
            "POST", server.url + "/v1/completions", json=flood, headers=headers, timeout=HANG_S
        ) as answer:
            started.set()
            for _ in answer.iter_lines():
                if ended.is_set():
                    return

    started = threading.Event()
    thread = threading.Thread(target=ask)
    thread.start()
    try:
        assert started.wait(HANG_S)
        post(server, "key-a", "/v1/completions", {"prompt": "hi", "max_tokens": 1})
        stats = server.engine.stats
        assert stats is not None
        assert stats.num_waiting > 20, "the other key's outputs still wait"
    finally:
        ended.set()
        thread.join()
    server.settle()


def test_a_line_filled_by_one_key_has_room_for_another(checkpoint: Path) -> None:
    with served(checkpoint, {"api_key": KEYS}, max_num_seqs=1, max_waiting_requests=4) as running:
        statuses: list[int] = []

        def ask() -> None:
            body = {"prompt": "once", "max_tokens": 200, "ignore_eos": True}
            headers = {"Authorization": "Bearer key-b"}
            answer = httpx.post(running.url + "/v1/completions", json=body, headers=headers, timeout=HANG_S)
            statuses.append(answer.status_code)

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        post(running, "key-a", "/v1/completions", {"prompt": "hi", "max_tokens": 1})
        for thread in threads:
            thread.join()
        assert set(statuses) == {200, 429}


@pytest.mark.parametrize(
    ("settings", "priority", "text"),
    [
        ({}, -1, "expected at least 0: lower is more urgent"),
        ({"min_priority": -3}, -4, "expected at least -3"),
        ({}, 7, None),
        ({"min_priority": -3}, -3, None),
    ],
)
def test_how_urgent_requests_may_be_is_the_operators_to_say(
    checkpoint: Path, settings: dict[str, Any], priority: int, text: str | None
) -> None:
    with served(checkpoint, settings, scheduling_policy="priority") as running:
        for path, body in (
            ("/v1/completions", {"prompt": "a", "max_tokens": 1}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}),
            ("/v1/responses", {"input": "a", "max_output_tokens": 1}),
        ):
            answer = httpx.post(
                running.url + path, json={**body, "priority": priority}, timeout=HANG_S, trust_env=False
            )
            if text is None:
                assert answer.status_code == 200, answer.text
            else:
                assert answer.status_code == 400
                assert text in answer.json()["error"]["message"]
                assert "--min-priority" in answer.json()["error"]["message"]
