"""What happens while an answer grows, in OpenAI's order; and the items that it leaves."""

from __future__ import annotations

from typing import Any

import pytest

from sensorium.entrypoints.openai.responses.output import OutputWriter


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def test_text_in_pieces() -> None:
    writer = OutputWriter()
    logprob = {"token": "a", "logprob": -1.0, "bytes": [97], "top_logprobs": []}
    events = [*writer.text("a", [logprob]), *writer.text("", []), *writer.text("b", []), *writer.end("completed")]
    assert kinds(events) == [
        *("output_item.added", "content_part.added", "output_text.delta", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
    ]
    (item,) = writer.items
    assert item["content"] == [{"type": "output_text", "text": "ab", "annotations": [], "logprobs": [logprob]}]
    assert item["status"] == "completed"
    assert events[0]["item"] == {**item, "status": "in_progress", "content": []}
    assert events[-1]["item"] == item
    assert {event.get("item_id", item["id"]) for event in events} == {item["id"]}


def test_reasoning_then_text_then_calls() -> None:
    writer = OutputWriter()
    events = [
        *writer.reasoning("Hm."),
        *writer.text("I look.", []),
        *writer.call("look", "call_1"),
        *writer.call_arguments('{"at"'),
        *writer.call_arguments(": 1}"),
        *writer.call("listen", "call_2"),
        *writer.end("incomplete"),
    ]
    assert kinds(events) == [
        *("output_item.added", "content_part.added", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.done", "output_item.done"),
    ]
    assert [event["output_index"] for event in events] == sorted(event["output_index"] for event in events)
    reasoning, message, look, listen = writer.items
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert message["content"][0]["text"] == "I look."
    assert (look["name"], look["arguments"], look["status"]) == ("look", '{"at": 1}', "completed")
    assert (listen["name"], listen["arguments"], listen["status"]) == ("listen", "", "incomplete")
    assert (look["call_id"], listen["call_id"]) == ("call_1", "call_2")


@pytest.mark.parametrize("begins", [[], ["Hm."]])
def test_an_answer_of_nothing_is_an_empty_message(begins: list[str]) -> None:
    writer = OutputWriter()
    events = [event for text in begins for event in writer.reasoning(text)] + list(writer.end("completed"))
    assert kinds(events)[-5:] == [
        *("output_item.added", "content_part.added", "output_text.done", "content_part.done", "output_item.done"),
    ]
    assert writer.items[-1]["content"][0]["text"] == ""
