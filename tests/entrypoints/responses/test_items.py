"""Items as clients send them: written out in full, made into messages, or refused by where they are wrong."""

from __future__ import annotations

from typing import Any

import pytest

from sensorium.entrypoints.openai.responses.conversation import Conversation
from sensorium.entrypoints.openai.responses.items import MAX_ITEMS, read_items
from sensorium.errors import RequestError

CALL = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"at": 1}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "a cat"}


def messages(given: Any, instructions: str | None = None) -> list[dict[str, Any]]:
    conversation = Conversation(instructions)
    conversation.add(read_items(given), "input")
    assert len(conversation.places) == len(conversation.messages)
    return conversation.messages


def test_a_string_is_a_message_of_the_user() -> None:
    (item,) = read_items("Hi")
    assert item["id"].startswith("msg_")
    assert item | {"id": ""} == {
        "type": "message",
        "id": "",
        "role": "user",
        "status": "completed",
        "content": [{"type": "input_text", "text": "Hi"}],
    }
    assert messages("Hi", "Be kind.") == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
    ]


def test_media_stand_where_they_are_put() -> None:
    content = [
        {"type": "input_text", "text": "a"},
        {"type": "input_image", "image_url": "data:x", "detail": "auto", "uuid": "u"},
        {"type": "input_video", "video_url": "https://x/y.mp4"},
        {"type": "input_audio", "input_audio": {"data": "AA", "format": "mp3"}},
        {"type": "input_text", "text": "b"},
    ]
    (message,) = messages([{"role": "user", "content": content}])
    assert message["content"] == [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": "data:x", "detail": "auto"}, "uuid": "u"},
        {"type": "video_url", "video_url": "https://x/y.mp4", "uuid": None},
        {"type": "input_audio", "input_audio": {"data": "AA", "format": "mp3"}},
        {"type": "text", "text": "b"},
    ]


def test_what_one_turn_brought_is_one_message() -> None:
    second = {**CALL, "call_id": "c2", "name": "listen"}
    given = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "What is there?"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}],
        },
        CALL,
        second,
        RESULT,
        {**RESULT, "call_id": "c2", "output": [{"type": "input_text", "text": "purring"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "assistant", "content": "It purrs."},
    ]
    calls = [
        {"id": each["call_id"], "type": "function", "function": {"name": each["name"], "arguments": each["arguments"]}}
        for each in (CALL, second)
    ]
    assert messages(given) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is there?"},
        {"role": "assistant", "reasoning_content": "Hm.", "content": "I look.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "name": "look", "content": "a cat"},
        {"role": "tool", "tool_call_id": "c2", "name": "listen", "content": "purring"},
        {"role": "assistant", "content": "A cat."},
        {"role": "assistant", "content": "It purrs."},
    ]


def test_a_call_alone_and_reasoning_after_a_call_begin_messages() -> None:
    reasoning = {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "So."}]}
    first, second, third = messages([CALL, reasoning, {"role": "user", "content": "?"}])
    assert first.keys() == {"role", "tool_calls"}
    assert second == {"role": "assistant", "reasoning_content": "So."}
    assert third["role"] == "user"


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (None, "input: got nothing, expected a string or a list"),
        ({"role": "user"}, "input: got a value of type dict"),
        ([1], r"input\[0\]: got a value of type int"),
        ([{}], r"input\[0\]\.type: got None"),
        ([{"type": "item_reference", "id": "x"}], r"input\[0\]\.type: got 'item_reference'"),
        ([{"type": "web_search_call"}], r"input\[0\]\.type: got 'web_search_call'"),
        ([{"type": ["message"]}], r"input\[0\]\.type"),
        ([{"role": "tool", "content": "x"}], r"input\[0\]\.role: got 'tool'"),
        ([{"role": "user"}], r"input\[0\]\.content: got nothing"),
        ([{"role": "user", "content": 5}], r"input\[0\]\.content: got a value of type int"),
        ([{"role": "user", "content": ["x"]}], r"input\[0\]\.content\[0\]: got a value of type str"),
        ([{"role": "user", "content": [{"type": "input_file"}]}], r"content\[0\]\.type: got 'input_file'"),
        ([{"role": "user", "content": [{"type": "input_image", "file_id": "x"}]}], r"content\[0\]\.file_id"),
        ([{"role": "user", "content": [{"type": "input_text"}]}], r"content\[0\]\.text: got nothing"),
        ([{"role": "user", "content": [{"type": "input_text", "text": "x", "y": 1}]}], r"content\[0\]\.y: got a field"),
        ([{"role": "user", "content": "x", "status": "done"}], r"input\[0\]\.status: got 'done'"),
        ([{"role": "user", "content": "x", "made_up": 1}], r"input\[0\]\.made_up: got a field"),
        ([{**CALL, "arguments": {}}], r"input\[0\]\.arguments: got a value of type dict"),
        ([RESULT], r"input\[0\]\.call_id: got 'c1'"),
        ([CALL, {**RESULT, "output": 1}], r"input\[1\]\.output: got a value of type int"),
        ([{"type": "reasoning", "summary": "x"}], r"input\[0\]\.summary"),
        ([{"type": "reasoning", "encrypted_content": "x"}], r"input\[0\]\.encrypted_content: got a field"),
        ([{"role": "user", "content": "x"}] * (MAX_ITEMS + 1), "expected at most 4096"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_no_item_is_refused_where_it_stands(given: Any, text: str) -> None:
    with pytest.raises(RequestError, match=text):
        messages(given)
