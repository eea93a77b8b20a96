"""A response in OpenAI's form: its head, its events, and itself at the end."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

from sensorium.entrypoints.openai.answers import chat_logprobs
from sensorium.entrypoints.openai.errors import error_code
from sensorium.entrypoints.openai.records import note_failure
from sensorium.entrypoints.openai.responses.body import ResponseBody
from sensorium.entrypoints.openai.responses.items import Item, new_id
from sensorium.entrypoints.openai.responses.output import Event, OutputWriter
from sensorium.entrypoints.openai.tools.plan import AnswerPlan
from sensorium.errors import SensoriumError
from sensorium.logger import get_logger
from sensorium.outputs import CompletionOutput, RequestOutput
from sensorium.parsing import Content, Reasoning, ToolCallArguments, ToolCallStart
from sensorium.sampling_params import SamplingParams

logger = get_logger(__name__)


class ResponseAnswer:
    """One response, from its beginning to its end."""

    def __init__(
        self, body: ResponseBody, model: str, plan: AnswerPlan, params: SamplingParams, *, is_stored: bool
    ) -> None:
        self.id = new_id("resp")
        self._num_top = body.num_logprobs or 0
        self._tells_usage = body.options().continuous_usage_stats
        self._reader = plan.reader()
        self._writer = OutputWriter()
        self._logprobs: list[Item] = []
        self._usage = _Usage()
        self._numbers = itertools.count()
        text: dict[str, Any] = {"format": {"type": "text"}, "verbosity": "medium"}
        if body.text is not None and body.text.format is not None:
            text["format"] = body.text.format.model_dump(by_alias=True, exclude_none=True)
        self._head: dict[str, Any] = {
            "id": self.id,
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.own_metadata(),
            "model": model,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": is_stored,
            "temperature": params.temperature,
            "text": text,
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_logprobs": body.num_logprobs or 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }

    @property
    def response(self) -> dict[str, Any]:
        """The response as it stands."""
        return dict(self._head)

    def not_stored(self) -> dict[str, Any]:
        """The response, which turned out too large to be kept."""
        self._head["store"] = False
        return self.response

    async def events(self, outputs: AsyncIterator[RequestOutput]) -> AsyncIterator[Event]:
        """Everything that happens, numbered, from `response.created` to `response.completed` or `.incomplete`.

        Raises what `outputs` raises.
        """
        yield self._numbered({"type": "response.created", "response": self.response})
        yield self._numbered({"type": "response.in_progress", "response": self.response})
        reason = None
        async with aclosing(outputs):  # type: ignore[type-var]
            async for output in outputs:
                (delta,) = output.outputs
                self._usage.take(output)
                reason = delta.finish_reason
                for event in self._written(delta):
                    yield self._numbered({**event, "usage": self._usage_body()} if self._tells_usage else event)
        status = "incomplete" if reason == "length" else "completed"
        for event in self._writer.end(status):
            yield self._numbered(event)
        self._end(status)
        yield self._numbered({"type": f"response.{status}", "response": self.response})

    async def stream(self, outputs: AsyncIterator[RequestOutput]) -> AsyncIterator[Event]:
        """As `events`, but a failure is the last of them: `response.failed`."""
        try:
            async with aclosing(self.events(outputs)) as events:  # type: ignore[type-var]
                async for event in events:
                    yield event
        except SensoriumError as error:
            note_failure(error)
            code = error_code(error) if error.status < 500 else SensoriumError.code
            yield self._numbered(self._failed(str(error), code))
        except Exception as error:
            note_failure(error)
            logger.exception("a stream broke off")
            text = "internal error: the answer could not be completed."
            yield self._numbered(self._failed(text, SensoriumError.code))

    def _numbered(self, event: Event) -> Event:
        return {**event, "sequence_number": next(self._numbers)}

    def _end(self, status: str) -> None:
        """Write down how it ended."""
        self._head |= {
            "status": status,
            "output": self._writer.items,
            "usage": self._usage_body(),
        }
        if status == "incomplete":
            self._head["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self._head["completed_at"] = int(time.time())

    def _written(self, delta: CompletionOutput) -> Iterator[Event]:
        """What happens by one more piece of the answer. Log probabilities are told with the next text."""
        logprobs = chat_logprobs(delta, self._num_top)
        self._logprobs += [] if logprobs is None else logprobs["content"]
        for said in self._reader.push(delta):
            told, self._logprobs = self._logprobs, []
            match said:
                case Content(text):
                    yield from self._writer.text(text, told)
                case Reasoning(text):
                    yield from self._writer.reasoning(text)
                case ToolCallStart(index, name):
                    yield from self._writer.call(name, self._reader.call_ids[index])
                case ToolCallArguments(_, text):
                    yield from self._writer.call_arguments(text)
        if delta.finished:
            yield from self._writer.more_logprobs(self._logprobs)

    def _usage_body(self) -> dict[str, Any]:
        return self._usage.body(self._reader.num_reasoning_tokens)

    def _failed(self, message: str, code: str) -> Event:
        error = {"code": code, "message": message}
        self._head |= {"status": "failed", "error": error, "output": self._writer.items}
        return {"type": "response.failed", "response": self.response}


class _Usage:
    """Counts the tokens of one request, delta by delta."""

    def __init__(self) -> None:
        self._num_input = self._num_cached = self._num_output = 0

    def take(self, output: RequestOutput) -> None:
        """Count an output."""
        self._num_input, self._num_cached = len(output.prompt_token_ids), output.num_cached_tokens
        self._num_output += sum(len(each.token_ids) for each in output.outputs)

    def body(self, num_reasoning_tokens: int) -> dict[str, Any]:
        """The `usage` of a response."""
        return {
            "input_tokens": self._num_input,
            "input_tokens_details": {"cached_tokens": self._num_cached, "cache_write_tokens": 0},
            "output_tokens": self._num_output,
            "output_tokens_details": {"reasoning_tokens": num_reasoning_tokens},
            "total_tokens": self._num_input + self._num_output,
        }
