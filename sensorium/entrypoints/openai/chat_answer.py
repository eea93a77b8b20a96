"""Answers to chats in OpenAI's form: whole, and as chunks."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

from sensorium.entrypoints.openai.answers import Usage, chat_logprobs, prompt_logprobs
from sensorium.entrypoints.openai.protocol import ChatBody, StreamOptions
from sensorium.entrypoints.openai.tools.plan import AnswerPlan, AnswerReader
from sensorium.outputs import CompletionOutput, RequestOutput
from sensorium.parsing import Content, Event, Reasoning, ToolCallArguments, ToolCallStart, collect


class ChatAnswer:
    """The answers to one chat."""

    def __init__(self, request_id: str, model: str, body: ChatBody, plan: AnswerPlan) -> None:
        self._head = {"id": f"chatcmpl-{request_id}", "created": int(time.time()), "model": model}
        self._num_top = body.top_logprobs or 0
        self._reports_prompt = body.prompt_logprobs is not None
        self._plan = plan
        self._includes_reasoning = body.include_reasoning
        self._readers: dict[int, AnswerReader] = {}
        self._usage = Usage()

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        """A `chat.completion`."""
        self._usage.take(0, output)
        choices = [self._choice(each) for each in output.outputs]
        answer = {**self._head, "object": "chat.completion", "choices": choices, "usage": self._usage_body()}
        if self._reports_prompt:
            answer["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        return answer

    async def chunks(self, outputs: AsyncIterator[RequestOutput], options: StreamOptions) -> AsyncIterator[Any]:
        """`chat.completion.chunk`s: a role first for each choice, then deltas, with usage where it is wanted."""
        async with aclosing(outputs):  # type: ignore[type-var]
            async for output in outputs:
                self._usage.take(0, output)
                for chunk in self._chunks(output):
                    yield {**chunk, "usage": self._usage_body()} if options.continuous_usage_stats else chunk
        if options.include_usage:
            yield {**self._chunk(), "usage": self._usage_body()}

    def _chunks(self, output: RequestOutput) -> Iterator[dict[str, Any]]:
        for each in output.outputs:
            if each.index not in self._readers:
                content = "" if self._plan.request is None else None
                yield self._chunk(_delta(each.index, {"role": "assistant", "content": content}))
            for delta in self._deltas(each):
                yield self._chunk(delta)

    def _choice(self, output: CompletionOutput) -> dict[str, Any]:
        events, reader = self._read(output)
        answer = collect(events)
        message: dict[str, Any] = {"role": "assistant", "content": answer.content, "refusal": None}
        if answer.reasoning is not None:
            message |= _reasoning(answer.reasoning)
        if answer.tool_calls:
            message["content"] = answer.content or None
            message["tool_calls"] = [
                {"id": call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call_id, call in zip(reader.call_ids, answer.tool_calls, strict=True)
            ]
        return {
            "index": output.index,
            "message": message,
            "logprobs": chat_logprobs(output, self._num_top),
            "finish_reason": _finish_reason(output, reader),
        }

    def _deltas(self, output: CompletionOutput) -> list[dict[str, Any]]:
        """One chunk for each event, since clients join a chunk's fields; the rest goes with the last."""
        events, reader = self._read(output)
        deltas = [_delta(output.index, self._delta_of(event, reader)) for event in events]
        logprobs, finish_reason = chat_logprobs(output, self._num_top), _finish_reason(output, reader)
        if not deltas and (logprobs is not None or finish_reason is not None):
            deltas = [_delta(output.index, {})]
        if deltas:
            deltas[-1] |= {"logprobs": logprobs, "finish_reason": finish_reason}
        return deltas

    def _read(self, output: CompletionOutput) -> tuple[list[Event], AnswerReader]:
        reader = self._readers.get(output.index)
        if reader is None:
            reader = self._readers[output.index] = self._plan.reader()
        events = reader.push(output)
        if not self._includes_reasoning:
            events = [event for event in events if not isinstance(event, Reasoning)]
        return events, reader

    def _delta_of(self, event: Event, reader: AnswerReader) -> dict[str, Any]:
        match event:
            case Content(text):
                return {"content": text}
            case Reasoning(text):
                return _reasoning(text)
            case ToolCallStart(index, name):
                function = {"name": name, "arguments": ""}
                return {
                    "tool_calls": [
                        {"index": index, "id": reader.call_ids[index], "type": "function"} | {"function": function}
                    ]
                }
            case ToolCallArguments(index, text):
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}

    def _chunk(self, *choices: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": list(choices)}

    def _usage_body(self) -> dict[str, Any]:
        body = self._usage.body()
        if self._plan.formats.reasoning is not None:
            num_tokens = sum(reader.num_reasoning_tokens for reader in self._readers.values())
            body["completion_tokens_details"] = {"reasoning_tokens": num_tokens}
        return body


def _finish_reason(output: CompletionOutput, reader: AnswerReader) -> str | None:
    return "tool_calls" if output.finish_reason == "stop" and reader.call_ids else output.finish_reason


def _reasoning(text: str) -> dict[str, Any]:
    """Under both names that clients read: `reasoning_content` (DeepSeek's) and `reasoning`."""
    return {"reasoning_content": text, "reasoning": text}


def _delta(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
