"""Errors that programs read: a word for what is wrong, and the field at fault, by the name that the client gave it.

Client libraries tell a context that is full by `code`, or by words of the message. Both were missing, so that none of
them could shorten a conversation and go on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from sensorium.entrypoints.openai.errors import as_named, error_body, error_response
from sensorium.errors import (
    EngineDeadError,
    EngineRestartingError,
    InvalidRequestError,
    OverloadedError,
    RequestAbortedError,
    RequestError,
)
from sensorium.media.encode import encode_audio
from tests.entrypoints.served import Served, served
from tests.helpers.waiting import HANG_S

KEY = "secret"
LONG = "word " * 3000
CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
COMPLETIONS = "/v1/completions"
WORDS_OF_CLIENTS = re.compile(r"This model's maximum context length is \d+ tokens")
"""By these words, client libraries that don't look at codes tell a context that is full."""


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served("demo", {"api_key": (KEY,)}, max_model_len=1024) as running:
        yield running


@pytest.fixture
def http(server: Served) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=server.url, timeout=HANG_S, trust_env=False, headers=headers) as client:
        yield client


def chat(content: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 2, **fields}


def told(response: httpx.Response, status: int) -> tuple[str, str | None]:
    """The code and the field of an error."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error["code"], error["param"]


# A context that is full


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, chat(LONG), "messages"),
        (CHAT, chat([{"type": "text", "text": LONG}]), "messages"),
        (COMPLETIONS, {"prompt": LONG}, "prompt"),
        (COMPLETIONS, {"prompt": [1] * 1024}, "prompt"),
        (COMPLETIONS, {"prompt": [[1], [1] * 3000], "echo": True, "logprobs": 1, "max_tokens": 0}, "prompt"),
        (RESPONSES, {"input": LONG}, "input"),
        (RESPONSES, {"input": [{"role": "user", "content": LONG}], "instructions": "Be brief."}, "input"),
        ("/v1/embeddings", {"input": LONG}, "input"),
        ("/v1/embeddings", {"input": ["a", LONG]}, "input"),
        ("/v1/chat/token_cost", {"messages": chat(LONG)["messages"]}, "messages"),
        ("/v1/responses/input_tokens", {"input": LONG}, "input"),
        ("/tokenize", {"prompt": LONG}, "prompt"),
    ],
)
def test_a_prompt_that_is_too_long_is_known_by_its_code(
    http: httpx.Client, path: str, body: dict[str, Any], param: str, stream: bool
) -> None:
    if stream and path not in (CHAT, COMPLETIONS, RESPONSES):
        body = {**body}
    elif stream:
        body = {**body, "stream": True}
    response = http.post(path, json=body)
    assert told(response, 400) == ("context_length_exceeded", param)
    message = response.json()["error"]["message"]
    assert WORDS_OF_CLIENTS.search(message)
    assert "prompt is too long" in message


def test_so_is_one_beside_a_sound(http: httpx.Client) -> None:
    sound = encode_audio(np.zeros(8000, np.float32), 16_000, "wav")
    response = http.post("/v1/audio/transcriptions", data={"prompt": LONG}, files={"file": ("a.wav", sound)})
    assert told(response, 400) == ("context_length_exceeded", "file")


def test_what_the_core_refuses_is_known_too() -> None:
    """It comes back as a message of its own, not as the error that was raised."""
    error = InvalidRequestError("request too long for the KV cache: got many", code="context_length_exceeded")
    assert error_body(error)["error"]["code"] == "context_length_exceeded"


def test_memory_that_is_too_small_is_known_too() -> None:
    with (
        served("demo", max_model_len=1024, num_blocks=8) as small,
        httpx.Client(base_url=small.url, timeout=HANG_S) as client,
    ):
        response = client.post(COMPLETIONS, json={"prompt": "a " * 200, "max_tokens": 2})
        assert told(response, 400) == ("context_length_exceeded", "prompt")


def test_the_official_client_has_both(server: Served) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": LONG}])
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
        with pytest.raises(openai.NotFoundError) as missing:
            client.embeddings.create(model="other", input="a")
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as refused:
            client.models.list()
        assert refused.value.code == "invalid_api_key"


# Everything else


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param"),
    [
        (CHAT, chat("a", model="other"), 404, "model_not_found", "model"),
        (COMPLETIONS, {"prompt": "a", "model": "other"}, 404, "model_not_found", "model"),
        (RESPONSES, {"input": "a", "model": "other"}, 404, "model_not_found", "model"),
        ("/v1/embeddings", {"input": "a", "model": "other"}, 404, "model_not_found", "model"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model_not_found", "model"),
        (CHAT, chat("a", top_p=7), 400, "invalid_value", "top_p"),
        (CHAT, chat("a", max_tokens=0), 400, "invalid_value", "max_tokens"),
        (
            CHAT,
            {**chat("a", max_completion_tokens=0), "max_tokens": None},
            400,
            "invalid_value",
            "max_completion_tokens",
        ),
        (RESPONSES, {"input": "a", "max_output_tokens": 0}, 400, "invalid_value", "max_output_tokens"),
        (RESPONSES, {"input": "a", "max_output_tokens": 2**40}, 400, "invalid_value", "max_output_tokens"),
        (CHAT, chat("a", logprobs=True, top_logprobs=500), 400, "invalid_value", "top_logprobs"),
        (COMPLETIONS, {"prompt": "a", "logprobs": 500}, 400, "invalid_value", "logprobs"),
        (COMPLETIONS, {"prompt": ""}, 400, "invalid_value", "prompt"),
        (COMPLETIONS, {"prompt": [10**8]}, 400, "invalid_value", "prompt"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"01": 1}}, 400, "invalid_value", "logit_bias"),
        (COMPLETIONS, {"prompt": "a", "stop": ["a", 1]}, 400, "invalid_type", "stop[1]"),
        (COMPLETIONS, {"prompt": ["a", 1]}, 400, "invalid_type", "prompt[1]"),
        (COMPLETIONS, {}, 400, "missing_required_parameter", "prompt"),
        (CHAT, {"messages": []}, 400, "invalid_value", "messages"),
        (CHAT, {"messages": "a"}, 400, "invalid_type", "messages"),
        (CHAT, chat([{"type": "text"}]), 400, "invalid_type", "messages[0].content[0].text"),
        (CHAT, chat([{"type": "x"}]), 400, "invalid_value", "messages[0].content[0].type"),
        (CHAT, chat("a", tools=[{"type": "function"}]), 400, "missing_required_parameter", "tools[0].function"),
        (CHAT, chat("a", made_up=1), 400, "unknown_parameter", "made_up"),
        (CHAT, chat("a", stream_options={"made_up": 1}), 400, "unknown_parameter", "stream_options.made_up"),
        (CHAT, chat("a", background=True), 400, "unsupported_parameter", "background"),
        (CHAT, chat("a", n=1, best_of=2), 400, "unsupported_parameter", "best_of"),
        (CHAT, chat("a", priority=5), 400, "invalid_value", "priority"),
        (CHAT, chat("a", response_format={"type": "x"}), 400, "invalid_value", "response_format.type"),
        ("/v1/embeddings", {"input": "a", "dimensions": 3}, 400, "unsupported_parameter", "dimensions"),
        ("/v1/embeddings", {"input": []}, 400, "invalid_value", "input"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, 400, "invalid_value", "encoding_format"),
        (
            RESPONSES,
            {"input": "a", "previous_response_id": "r"},
            404,
            "previous_response_not_found",
            "previous_response_id",
        ),
        (RESPONSES, {"input": [{"type": "x"}]}, 400, "unsupported_value", "input[0].type"),
        ("/detokenize", {"tokens": [-1]}, 400, "invalid_value", "tokens"),
        ("/nothing", {}, 404, "not_found", None),
        ("/v1/models", {}, 405, "method_not_allowed", None),
    ],
)
def test_each_error_names_its_kind_and_its_field(
    http: httpx.Client, path: str, body: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    assert told(http.post(path, json=body), status) == (code, param)


@pytest.mark.parametrize(
    ("url", "status", "code"),
    [
        ("data:image/png;base64,AAAA", 415, "unsupported_media_type"),
        ("http://127.0.0.1/a.png", 403, "media_forbidden"),
        ("file:///etc/passwd", 403, "media_forbidden"),
    ],
)
def test_media_are_named_by_their_part(http: httpx.Client, url: str, status: int, code: str) -> None:
    picture = {"type": "image_url", "image_url": {"url": url}}
    found, param = told(http.post(CHAT, json=chat(["a", picture])), status)
    assert found == code
    assert str(param).startswith("messages")


def test_what_stands_in_the_way_of_a_route_has_a_code(server: Served, http: httpx.Client) -> None:
    with httpx.Client(base_url=server.url, trust_env=False, timeout=HANG_S) as stranger:
        assert told(stranger.post(CHAT, json=chat("a")), 401) == ("invalid_api_key", None)
    plain = http.post(CHAT, content="{}", headers={"Content-Type": "text/plain"})
    assert told(plain, 415) == ("unsupported_content_type", None)
    broken = http.post(CHAT, content="{", headers={"Content-Type": "application/json"})
    assert told(broken, 400) == ("invalid_value", None)
    assert told(http.get("/v1/responses/r"), 404) == ("response_not_found", None)
    assert told(http.get("/v1/models/other"), 404) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (OverloadedError("waiting requests: got 9"), 429, "rate_limit_exceeded"),
        (EngineDeadError("the engine: has ended"), 503, "service_unavailable"),
        (EngineRestartingError("the engine: restarts", retry_after_s=3), 503, "service_unavailable"),
        (RequestAbortedError("the client has gone."), 499, "request_aborted"),
        (ZeroDivisionError("inside"), 500, "server_error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_errors_of_a_busy_server_have_codes(error: Exception, status: int, code: str) -> None:
    response = error_response(error)
    assert response.status_code == status
    assert json.loads(bytes(response.body))["error"]["code"] == code
    assert "inside" not in bytes(response.body).decode()


def test_a_failure_of_the_model_is_the_servers() -> None:
    error = RequestError("The model failed on this request.")
    error.status = 500
    told_of = {"type": "server_error", "param": None, "code": "server_error"}
    assert error_body(error)["error"] == {"message": str(error), **told_of}


def test_errors_call_fields_what_the_client_called_them() -> None:
    message = r"^max_output_tokens: got 0; min_tokens, max_output_tokens$"
    with pytest.raises(InvalidRequestError, match=message), as_named(max_tokens="max_output_tokens"):
        raise InvalidRequestError("max_tokens: got 0; min_tokens, max_tokens")


# Numbers that arrive as texts


@pytest.mark.parametrize("text", [" 5 ", "0_5", "+5", "05", "5.0", "\u0665", "\uff15", "-5", "", "five", "5" * 30])
def test_counts_in_queries_are_written_as_json_writes_them(http: httpx.Client, text: str) -> None:
    kept = http.post(RESPONSES, json={"input": "a", "max_output_tokens": 1}).json()["id"]
    assert http.get(f"/v1/responses/{kept}/input_items", params={"limit": "5"}).status_code == 200
    response = http.get(f"/v1/responses/{kept}/input_items", params={"limit": text})
    assert told(response, 400) == ("invalid_value", "limit")


@pytest.mark.parametrize(
    ("name", "text", "is_taken"),
    [
        *(("max_tokens", text, True) for text in ("5", "400")),
        *(("max_tokens", text, False) for text in (" 5", "0_5", "+5", "05", "5.0", "\u0665", "-5", "true", "null")),
        *(("temperature", text, True) for text in ("0", "0.5", "1e-1", "1")),
        *(
            ("temperature", text, False)
            for text in (" 1", "0_1", "+1", "01", ".5", "1.", "\u0661", "inf", "nan", "0x1")
        ),
        *(("stream", text, True) for text in ("true", "false", "True", "False")),
        *(("stream", text, False) for text in (" true", "yes", "1", "on", "t")),
        *((name, "", True) for name in ("max_tokens", "temperature", "stream", "language", "response_format")),
        *((name, "", True) for name in ("chunking_strategy", "include[]", "timestamp_granularities[]", "user")),
        *(("store", "false", True), ("user", "me", True), ("service_tier", "auto", True), ("metadata", "{}", True)),
        *(("store", "perhaps", False), ("service_tier", "flex", False), ("chunking_strategy", "auto", False)),
    ],
)
def test_numbers_in_forms_are_written_as_json_writes_them(
    http: httpx.Client, name: str, text: str, is_taken: bool
) -> None:
    sound = encode_audio(np.zeros(8000, np.float32), 16_000, "wav")
    response = http.post("/v1/audio/transcriptions", data={name: text}, files={"file": ("a.wav", sound)})
    if is_taken:
        assert response.status_code == 200, response.text
    else:
        assert told(response, 400)[1] == name


@pytest.mark.parametrize("key", [" 1 ", "0_1", "+1", "01", "-1", "1.0", "1e0", "\u0661", "\uff11", "", "one", "9" * 20])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_token_ids_are_digits(http: httpx.Client, path: str, key: str) -> None:
    body = chat("a") if path == CHAT else {"prompt": "a", "max_tokens": 1}
    assert http.post(path, json={**body, "logit_bias": {"1": 1}}).status_code == 200
    assert told(http.post(path, json={**body, "logit_bias": {key: 1}}), 400) == ("invalid_value", "logit_bias")


@pytest.mark.parametrize("second", ["1", r"\u0031"])
def test_a_token_id_stands_there_once(http: httpx.Client, second: str) -> None:
    """Which of two biases counts is anybody's guess, and another reader's may be another."""
    content = '{"prompt": "a", "max_tokens": 1, "logit_bias": {"1": 1, "SECOND": 2}}'.replace("SECOND", second)
    response = http.post(COMPLETIONS, content=content, headers={"Content-Type": "application/json"})
    assert told(response, 400)[0] == "invalid_value"
    assert "got '1' twice" in response.json()["error"]["message"]
