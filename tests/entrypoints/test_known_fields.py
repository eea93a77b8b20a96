"""Fields of OpenAI's API and of clients that speak it: each is implemented, taken where it asks for nothing, or named.

A client that sends `"prediction": null` or `"store": false` got a 400 on one route and an answer on another; a load
generator that sends `continuous_usage_stats`, and a bridge that sends `include`, got nothing at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import httpx
import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.audio import transcription_create_params
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionContentPartImageParam,
    ChatCompletionContentPartInputAudioParam,
    ChatCompletionContentPartRefusalParam,
    ChatCompletionContentPartTextParam,
    ChatCompletionDeveloperMessageParam,
    ChatCompletionFunctionToolParam,
    ChatCompletionStreamOptionsParam,
    ChatCompletionSystemMessageParam,
    ChatCompletionToolMessageParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import (
    EasyInputMessageParam,
    FunctionToolParam,
    ResponseFunctionToolCallParam,
    ResponseIncludable,
    ResponseInputImageParam,
    ResponseInputTextParam,
    ResponseOutputMessageParam,
    ResponseOutputRefusalParam,
    ResponseOutputTextParam,
    ResponseReasoningItemParam,
    ResponseTextConfigParam,
    input_token_count_params,
    response_create_params,
    response_input_item_param,
)
from openai.types.shared_params import (
    FunctionDefinition,
    Reasoning,
    ResponseFormatJSONSchema,
    response_format_json_schema,
)
from pydantic import BaseModel

from sensorium.chat.content import parse_messages
from sensorium.entrypoints.openai import fields, protocol
from sensorium.entrypoints.openai.body import Body, field_names
from sensorium.entrypoints.openai.pooling import bodies
from sensorium.entrypoints.openai.protocol import parse_body
from sensorium.entrypoints.openai.responses.body import ReasoningConfig, ResponseBody, TextConfig
from sensorium.entrypoints.openai.responses.items import read_items
from sensorium.entrypoints.openai.structured_outputs import JsonSchemaFormat, ResponseFormat
from sensorium.errors import InvalidRequestError, RequestError, UnsupportedFeatureError
from tests.entrypoints.served import Served, served
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.waiting import HANG_S

MESSAGES = [{"role": "user", "content": "Hi"}]
BODIES: list[tuple[type[Body], dict[str, Any]]] = [
    (protocol.ChatBody, {"messages": MESSAGES}),
    (protocol.CompletionBody, {"prompt": "Hi"}),
    (ResponseBody, {"input": "Hi"}),
    (bodies.EmbeddingBody, {"input": "Hi"}),
    (bodies.ClassifyBody, {"input": "Hi"}),
    (bodies.PoolingBody, {"input": "Hi"}),
    (bodies.ScoreBody, {"text_1": "Hi", "text_2": "Ho"}),
    (bodies.RerankBody, {"query": "Hi", "documents": ["Ho"]}),
    (protocol.TranscriptionForm, {}),
    (protocol.TokenCostBody, {"messages": MESSAGES}),
    (protocol.TokenizeBody, {"prompt": "Hi"}),
    (protocol.DetokenizeBody, {"tokens": [1]}),
]
ROUTES = [
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2}),
    ("/v1/completions", {"prompt": "Hi", "max_tokens": 2}),
    ("/v1/responses", {"input": "Hi", "max_output_tokens": 2}),
    ("/v1/embeddings", {"input": "Hi"}),
    ("/v1/chat/token_cost", {"messages": MESSAGES}),
]
KINDS = pytest.mark.parametrize(("kind", "base"), BODIES, ids=[kind.__name__ for kind, _ in BODIES])


def names_of(*kinds: Any) -> set[str]:
    return {name for kind in kinds for name in get_type_hints(kind)}


CLIENT: list[tuple[type[BaseModel], str, set[str]]] = [
    (
        protocol.ChatBody,
        "",
        names_of(
            chat_create_params.CompletionCreateParamsNonStreaming, chat_create_params.CompletionCreateParamsStreaming
        ),
    ),
    (
        protocol.CompletionBody,
        "",
        names_of(
            completion_create_params.CompletionCreateParamsNonStreaming,
            completion_create_params.CompletionCreateParamsStreaming,
        ),
    ),
    (
        ResponseBody,
        "",
        names_of(
            response_create_params.ResponseCreateParamsNonStreaming,
            response_create_params.ResponseCreateParamsStreaming,
            input_token_count_params.InputTokenCountParams,
        ),
    ),
    (bodies.EmbeddingBody, "", names_of(embedding_create_params.EmbeddingCreateParams)),
    (
        protocol.TranscriptionForm,
        "",
        names_of(
            transcription_create_params.TranscriptionCreateParamsNonStreaming,
            transcription_create_params.TranscriptionCreateParamsStreaming,
        )
        - {"file"},
    ),
    (
        protocol.StreamOptions,
        "stream_options.",
        names_of(ChatCompletionStreamOptionsParam, response_create_params.StreamOptions),
    ),
    (ReasoningConfig, "reasoning.", names_of(Reasoning)),
    (TextConfig, "text.", names_of(ResponseTextConfigParam, input_token_count_params.Text)),
    (ResponseFormat, "response_format.", names_of(ResponseFormatJSONSchema)),
    (JsonSchemaFormat, "response_format.json_schema.", names_of(response_format_json_schema.JSONSchema)),
    (protocol.ToolBody, "tools.", names_of(ChatCompletionFunctionToolParam)),
    (protocol.FunctionBody, "tools.", names_of(FunctionDefinition, FunctionToolParam) - {"type"}),
]


@pytest.mark.parametrize(("kind", "place", "names"), CLIENT, ids=[kind.__name__ for kind, _, _ in CLIENT])
def test_every_field_of_the_client_is_decided(kind: type[BaseModel], place: str, names: set[str]) -> None:
    """A field that a new version of the client has shows up here: implement it, or say what asks for nothing."""
    assert len(names) > 1
    undecided = {name for name in names - field_names(kind) if fields.known_field(f"{place}{name}") is None}
    assert not undecided


def test_all_that_may_be_included_is_known() -> None:
    assert {*get_args(ResponseIncludable)} == {fields.LOGPROBS, *fields.INCLUDABLE}


# Null


def _every_name() -> set[str]:
    return {name for _, place, names in CLIENT if not place for name in names} | {
        name for kind, _ in BODIES for name in field_names(kind)
    }


@KINDS
def test_null_is_nothing_in_every_field_of_every_route(kind: type[Body], base: dict[str, Any]) -> None:
    bare = parse_body(kind, base)
    for name in _every_name() - base.keys():
        assert parse_body(kind, {**base, name: None}) == bare, name
    # A response may go on with an earlier one, and what is pooled may come as messages.
    needed = () if kind is ResponseBody or issubclass(kind, bodies.InputsBody) else base.keys()
    for name in needed:
        with pytest.raises(InvalidRequestError, match=f"{name}: got nothing, expected a value"):
            parse_body(kind, {**base, name: None})


@pytest.mark.parametrize(
    ("kind", "base", "inner"),
    [
        (protocol.ChatBody, {"messages": MESSAGES, "stream": True}, ("stream_options", "include_usage")),
        (protocol.ChatBody, {"messages": MESSAGES, "stream": True}, ("stream_options", "continuous_usage_stats")),
        (protocol.CompletionBody, {"prompt": "Hi", "stream": True}, ("stream_options", "include_obfuscation")),
        (ResponseBody, {"input": "Hi"}, ("text", "verbosity")),
        (ResponseBody, {"input": "Hi"}, ("text", "format")),
        (ResponseBody, {"input": "Hi"}, ("reasoning", "effort")),
        (ResponseBody, {"input": "Hi"}, ("reasoning", "summary")),
        (ResponseBody, {"input": "Hi"}, ("reasoning", "generate_summary")),
        (ResponseBody, {"input": "Hi"}, ("metadata", "a")),
    ],
)
def test_null_is_nothing_inside_objects(kind: type[Body], base: dict[str, Any], inner: tuple[str, str]) -> None:
    outer, name = inner
    with_null, without = (parse_body(kind, {**base, outer: value}) for value in ({name: None}, {}))
    for each in (with_null, without):
        if isinstance(each, ResponseBody):
            each.check()
            assert each.own_metadata() == {}
        else:
            assert isinstance(each, protocol.SamplingBody)
            assert each.options() == protocol.StreamOptions()


# Values that ask for nothing

NEUTRAL: list[dict[str, Any]] = [
    *({"store": False}, {"metadata": {}}, {"metadata": {"a": "b"}}, {"user": "me"}, {"user": ""}),
    *({"safety_identifier": "a"}, {"prompt_cache_key": "a"}, {"prompt_cache_retention": "in_memory"}),
    *({"prompt_cache_retention": "24h"}, {"prompt_cache_options": {"mode": "implicit"}}),
    *({"service_tier": "auto"}, {"service_tier": "default"}, {"background": False}, {"truncation": "disabled"}),
    *({"modalities": ["text"]}, {"parallel_tool_calls": True}, {"parallel_tool_calls": False}),
    *({"tools": []}, {"tool_choice": "auto"}, {"tool_choice": "none"}, {"functions": []}, {"function_call": "none"}),
    *({"max_tool_calls": 5}, {"include": []}, {"include": ["reasoning.encrypted_content"]}, {"verbosity": "medium"}),
    *(
        {"best_of": 1},
        {"n": 1},
        {"logit_bias": {}},
        {"suffix": ""},
        {"echo": False},
        {"stream": False},
        {"logprobs": False},
    ),
    *({"use_beam_search": False}, {"length_penalty": 1.0}, {"length_penalty": 1}, {"allowed_token_ids": []}),
    *({"context_management": []}, {"top_logprobs": 0}, {"separate_reasoning": True}),
]


@KINDS
@pytest.mark.parametrize("extra", NEUTRAL, ids=str)
def test_what_asks_for_nothing_is_taken_on_all_routes_alike(
    kind: type[Body], base: dict[str, Any], extra: dict[str, Any]
) -> None:
    assert isinstance(parse_body(kind, {**base, **extra}), kind)


ASKING: list[tuple[dict[str, Any], str]] = [
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"moderation": {"model": "m"}}, "moderation"),
    ({"background": True}, "background"),
    ({"truncation": "auto"}, "truncation"),
    ({"service_tier": "priority"}, "service_tier"),
    ({"store": 0}, "store"),
    ({"store": "false"}, "store"),
    ({"metadata": {"a": 1}}, "metadata"),
    ({"metadata": {"a": "b" * 513}}, "metadata"),
    ({"metadata": {str(i): "b" for i in range(17)}}, "metadata"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"verbosity": "loud"}, "verbosity"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"length_penalty": 1.2}, "length_penalty"),
    ({"length_penalty": True}, "length_penalty"),
    ({"conversation": "c"}, "conversation"),
    ({"include": ["made.up"]}, "include"),
]


@pytest.mark.parametrize(("kind", "base"), BODIES[:4], ids=[kind.__name__ for kind, _ in BODIES[:4]])
@pytest.mark.parametrize(("extra", "name"), ASKING, ids=lambda value: value if isinstance(value, str) else None)
def test_what_asks_for_something_is_refused_by_name(
    kind: type[Body], base: dict[str, Any], extra: dict[str, Any], name: str
) -> None:
    with pytest.raises(RequestError) as caught:
        _parsed_and_checked(kind, {**base, **extra})
    assert str(caught.value).startswith(name)
    assert (caught.value.status, caught.value.code) != (400, "unknown_parameter")


def _parsed_and_checked(kind: type[Body], content: dict[str, Any]) -> None:
    body = parse_body(kind, content)
    if isinstance(body, ResponseBody):  # implements some of them, and looks at those later
        body.check()


@KINDS
@pytest.mark.parametrize("value", [None, 1, {}, "x"])
def test_unknown_fields_are_refused_by_name(kind: type[Body], base: dict[str, Any], value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"^made_up: got a field") as caught:
        parse_body(kind, {"made_up": value, **base})
    assert (caught.value.code, caught.value.param) == ("unknown_parameter", "made_up")


def test_unknown_fields_inside_objects_are_named_with_their_path() -> None:
    tool = {"type": "function", "function": {"name": "f", "made_up": None}}
    with pytest.raises(InvalidRequestError, match=r"^tools\[0\]\.function\.made_up: got a field"):
        parse_body(protocol.ChatBody, {"messages": MESSAGES, "tools": [tool]})
    tool["function"] = {"name": "f", "defer_loading": True}
    with pytest.raises(UnsupportedFeatureError, match=r"^tools\[0\]\.function\.defer_loading: got True") as caught:
        parse_body(protocol.ChatBody, {"messages": MESSAGES, "tools": [tool]})
    assert caught.value.param == "tools[0].function.defer_loading"


def test_as_many_are_given_as_are_made() -> None:
    """`best_of` throws outputs away. With `n` of the same size, it throws none away."""
    for fields_, is_taken in (({"best_of": 3, "n": 3}, True), ({"best_of": 3}, False), ({"best_of": 1, "n": 2}, False)):
        body = parse_body(protocol.CompletionBody, {"prompt": "Hi", **fields_})
        if is_taken:
            assert body.params().n == 3
        else:
            with pytest.raises(UnsupportedFeatureError, match=r"^best_of: got"):
                body.params()


def test_both_names_of_a_bound_may_say_the_same() -> None:
    """A load generator sends both, on either route."""
    both = {"max_tokens": 5, "max_completion_tokens": 5}
    assert parse_body(protocol.ChatBody, {"messages": MESSAGES, **both}).params().max_tokens == 5
    assert parse_body(protocol.CompletionBody, {"prompt": "Hi", **both}).params().max_tokens == 5
    with pytest.raises(InvalidRequestError, match=r"^max_tokens: got 5, and 6 for max_completion_tokens"):
        parse_body(protocol.ChatBody, {"messages": MESSAGES, "max_tokens": 5, "max_completion_tokens": 6}).params()
    with pytest.raises(InvalidRequestError, match=r"^max_completion_tokens: got 0"):
        parse_body(protocol.ChatBody, {"messages": MESSAGES, "max_completion_tokens": 0}).params()
    with pytest.raises(InvalidRequestError, match=r"^top_logprobs: got 1000"):
        parse_body(protocol.ChatBody, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 1000}).params()


def test_options_of_a_stream_ask_for_nothing_without_one() -> None:
    for options in ({}, {"include_usage": False}, {"include_usage": None, "continuous_usage_stats": False}):
        body = parse_body(protocol.ChatBody, {"messages": MESSAGES, "stream_options": options})
        assert body.options() == protocol.StreamOptions()
    body = parse_body(protocol.ChatBody, {"messages": MESSAGES, "stream_options": {"include_usage": True}})
    with pytest.raises(InvalidRequestError, match=r"^stream_options: got options without stream"):
        body.options()


# Over HTTP


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(make_checkpoint("qwen2_vl")) as running:
        yield running


@pytest.fixture
def http(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=HANG_S, trust_env=False) as client:
        yield client


@pytest.mark.parametrize(("path", "base"), ROUTES, ids=[path for path, _ in ROUTES])
def test_all_of_them_at_once_change_no_answer(http: httpx.Client, path: str, base: dict[str, Any]) -> None:
    kind = {
        "/v1/chat/completions": protocol.ChatBody,
        "/v1/completions": protocol.CompletionBody,
        "/v1/responses": ResponseBody,
    }.get(path)
    greedy = {"temperature": 0} if kind is not None else {}
    every = dict.fromkeys(_every_name() - base.keys() - {"model"})
    for extra in NEUTRAL:
        every |= extra
    response = http.post(path, json={**every, **base, **greedy})
    assert response.status_code == 200, response.text
    assert "Warning" not in response.headers
    plain = http.post(path, json={**base, **greedy})
    assert _said(response.json()) == _said(plain.json())


def _said(answer: dict[str, Any]) -> Any:
    if "choices" in answer:
        return [choice.get("text") or choice["message"]["content"] for choice in answer["choices"]]
    if "output" in answer:
        return [part["text"] for item in answer["output"] for part in item["content"]]
    return answer.get("data") or answer.get("prompt_tokens")


@pytest.mark.parametrize(
    ("path", "extra", "name"),
    [
        ("/v1/chat/completions", {"store": True}, "store"),
        ("/v1/chat/completions", {"verbosity": "low"}, "verbosity"),
        ("/v1/completions", {"verbosity": "high"}, "verbosity"),
        ("/v1/chat/completions", {"prediction": {"type": "content", "content": "Hello"}}, "prediction"),
        ("/v1/responses", {"text": {"verbosity": "low"}}, "text.verbosity"),
        ("/v1/responses", {"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ("/v1/responses", {"stream": True, "text": {"verbosity": "high"}}, "text.verbosity"),
    ],
)
def test_what_is_passed_over_is_told(http: httpx.Client, path: str, extra: dict[str, Any], name: str) -> None:
    response = http.post(path, json={**dict(ROUTES)[path], **extra})
    assert response.status_code == 200, response.text
    assert response.headers["Warning"].startswith(f'299 sensorium "{name} was ignored: ')


def test_hints_for_caches_in_parts_are_taken(http: httpx.Client) -> None:
    part = {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}, "prompt_cache_breakpoint": None}
    chat = {"messages": [{"role": "user", "content": [part], "name": None}], "max_tokens": 2}
    assert http.post("/v1/chat/completions", json=chat).status_code == 200
    part = {"type": "input_text", "text": "Hi", "prompt_cache_breakpoint": {"mode": "explicit"}}
    item = {"role": "user", "content": [part], "phase": None}
    assert http.post("/v1/responses", json={"input": [item], "max_output_tokens": 2}).status_code == 200


def test_null_is_nothing_in_the_choice_of_a_tool(http: httpx.Client) -> None:
    function = {"name": "f", "description": None, "parameters": None, "strict": None}
    choice = {"type": "function", "function": {"name": "f", "made_up": None}, "custom": None}
    chat = {"messages": MESSAGES, "tools": [{"type": "function", "function": function}], "tool_choice": choice}
    response = http.post("/v1/chat/completions", json=chat)
    assert response.status_code == 200, response.text
    flat = {"type": "function", "name": "f", "made_up": None}
    body = {"input": "Hi", "tools": [{"type": "function", **function}], "tool_choice": flat}
    response = http.post("/v1/responses", json=body)
    assert response.status_code == 200, response.text


# Messages, parts and items

PARTS: list[tuple[Any, dict[str, Any]]] = [
    (ChatCompletionContentPartTextParam, {"type": "text", "text": "a"}),
    (ChatCompletionContentPartRefusalParam, {"type": "refusal", "refusal": "a"}),
    (ChatCompletionContentPartImageParam, {"type": "image_url", "image_url": {"url": "data:,", "detail": None}}),
    (ChatCompletionContentPartInputAudioParam, {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}),
]
CHAT_MESSAGES: list[tuple[Any, dict[str, Any]]] = [
    (ChatCompletionUserMessageParam, {"role": "user", "content": "a"}),
    (ChatCompletionSystemMessageParam, {"role": "system", "content": "a"}),
    (ChatCompletionDeveloperMessageParam, {"role": "developer", "content": "a"}),
    (ChatCompletionToolMessageParam, {"role": "tool", "content": "a", "tool_call_id": "c"}),
    (ChatCompletionAssistantMessageParam, {"role": "assistant", "content": "a"}),
]
ITEMS: list[tuple[Any, dict[str, Any]]] = [
    (EasyInputMessageParam, {"role": "user", "content": "a"}),
    (ResponseOutputMessageParam, {"type": "message", "role": "assistant", "content": "a"}),
    (ResponseFunctionToolCallParam, {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}),
    (response_input_item_param.FunctionCallOutput, {"type": "function_call_output", "call_id": "c", "output": "a"}),
    (ResponseReasoningItemParam, {"type": "reasoning", "summary": []}),
]
ITEM_PARTS: list[tuple[Any, dict[str, Any]]] = [
    (ResponseInputTextParam, {"type": "input_text", "text": "a"}),
    (ResponseInputImageParam, {"type": "input_image", "image_url": "data:,"}),
    (ResponseOutputTextParam, {"type": "output_text", "text": "a"}),
    (ResponseOutputRefusalParam, {"type": "refusal", "refusal": "a"}),
]


def _with_nulls(kind: Any, base: dict[str, Any]) -> dict[str, Any]:
    names = names_of(kind)
    assert base.keys() <= names
    return {**dict.fromkeys(names), **base}


@pytest.mark.parametrize(("kind", "base"), PARTS, ids=lambda value: value["type"] if isinstance(value, dict) else None)
def test_null_is_nothing_in_parts_of_chats(kind: Any, base: dict[str, Any]) -> None:
    parsed = parse_messages([{"role": "user", "content": [_with_nulls(kind, base)]}])
    assert len(parsed[0].parts or ()) == 1


@pytest.mark.parametrize(
    ("kind", "base"), CHAT_MESSAGES, ids=lambda value: value["role"] if isinstance(value, dict) else None
)
def test_null_is_nothing_in_messages_of_chats(kind: Any, base: dict[str, Any]) -> None:
    with_nulls, without = parse_messages([_with_nulls(kind, base), base])
    assert (with_nulls.text, with_nulls.fields) == (without.text, without.fields)


@pytest.mark.parametrize(("kind", "base"), ITEMS, ids=lambda value: str(value) if isinstance(value, dict) else None)
def test_null_is_nothing_in_items(kind: Any, base: dict[str, Any]) -> None:
    with_nulls, without = read_items([_with_nulls(kind, base), base])
    assert with_nulls | {"id": ""} == without | {"id": ""}


@pytest.mark.parametrize(
    ("kind", "base"), ITEM_PARTS, ids=lambda value: value["type"] if isinstance(value, dict) else None
)
def test_null_is_nothing_in_parts_of_items(kind: Any, base: dict[str, Any]) -> None:
    (item,) = read_items([{"role": "assistant", "content": [_with_nulls(kind, base), base]}])
    first, second = item["content"]
    assert first == second


# What streams hold


def _events(http: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = http.post(path, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    return [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_usage_comes_with_every_piece_where_it_is_wanted(http: httpx.Client, path: str) -> None:
    """A load generator counts tokens by the usage of each chunk."""
    body = {**dict(ROUTES)[path], "max_tokens": 5, "ignore_eos": True, "n": 2}
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = _events(http, path, {**body, "stream_options": options})
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == 10
    assert events[-1]["choices"] == []
    assert all(
        e["usage"]["total_tokens"] - e["usage"]["completion_tokens"] == e["usage"]["prompt_tokens"] > 0 for e in events
    )
    only_pieces = _events(http, path, {**body, "stream_options": {"continuous_usage_stats": True}})
    assert all(event["choices"] and event["usage"] for event in only_pieces)
    only_end = _events(http, path, {**body, "stream_options": {"include_usage": True}})
    assert [event for event in only_end if event.get("usage")] == only_end[-1:]


def test_usage_comes_with_every_piece_of_a_response(http: httpx.Client) -> None:
    body = {"input": "Hi", "max_output_tokens": 5, "ignore_eos": True}
    events = _events(http, "/v1/responses", {**body, "stream_options": {"continuous_usage_stats": True}})
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert deltas
    assert 1 <= deltas[-1]["usage"]["output_tokens"] <= 5
    assert _events(http, "/v1/responses", {**body, "stream_options": {"include_usage": True}})[-1]["response"]["usage"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_padded_pieces_are_of_one_length(http: httpx.Client, path: str) -> None:
    bound = {"max_output_tokens" if path == "/v1/responses" else "max_tokens": 12, "ignore_eos": True}
    body = {**dict(ROUTES)[path], **bound, "stream": True}
    response = http.post(path, json={**body, "stream_options": {"include_obfuscation": True}})
    data = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
    assert data
    assert {len(each.encode()) % 128 for each in data} == {0}
    assert all("obfuscation" in json.loads(each) for each in data)
    bare = http.post(path, json={**body, "stream_options": {"include_obfuscation": False}})
    assert "obfuscation" not in bare.text
