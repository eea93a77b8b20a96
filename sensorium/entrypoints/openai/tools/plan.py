"""How one request's answers are constrained and parsed.

plan = AnswerPlan(formats, request, prompt, tokenizer)
outputs = generate(prompt, plan.params(params))
reader = plan.reader()                       # one for each choice
events = reader.push(output) ...
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sensorium.chat.answer_formats import AnswerFormats
from sensorium.entrypoints.openai.tools.request import ToolRequest
from sensorium.errors import InvalidRequestError, RequestError
from sensorium.outputs import CompletionOutput
from sensorium.parsing import AnswerParser, Event, Reasoning, ToolCallStart
from sensorium.parsing.grammars import Held, answer_grammar, json_grammar
from sensorium.sampling_params import SamplingParams
from sensorium.structured_outputs import FIELD, StructuredOutputs

_JSON_KINDS = ("json", "json_object")
_LETTERS_AND_DIGITS = string.ascii_letters + string.digits
_CALL_ID_CHARS = 24


class AnswerPlan:
    """The plan for a request's answers, made before there are any.

    Args:
        formats: how the model marks reasoning and calls.
        request: the functions that it may call, if any.
        prompt: the rendered prompt, which shows whether the answer begins within reasoning.
        tokenizer: counts the tokens of reasoning whose end is no token of its own.
        is_continued: the prompt ends with the beginning of an answer.

    Raises:
        UnsupportedFeatureError: There are functions, and the model has no format of calls.
    """

    def __init__(
        self,
        formats: AnswerFormats,
        request: ToolRequest | None,
        prompt: str,
        tokenizer: Any,
        *,
        is_continued: bool = False,
    ) -> None:
        self.formats = formats
        self.request = request
        self.tokenizer = tokenizer
        self.tool_format = formats.calls() if request is not None else None
        self.is_reasoning_open = formats.is_reasoning_open(prompt, is_continued=is_continued)
        self._has_grammar = False
        self._has_schema = False
        self._format_field: str | None = None
        self._may_reason = formats.reasoning is not None and not prompt.rstrip().endswith(formats.reasoning.end)

    def params(self, params: SamplingParams, format_field: str | None = None) -> SamplingParams:
        """Sampling parameters that keep marks in the text, and have the constraint on answers.

        `format_field`: what asks for structured outputs, if it isn't `structured_outputs`.

        Raises:
            InvalidRequestError: An output can't be held to functions and to the other at once.
        """
        self._format_field = format_field
        if self.formats.token_ids:
            visible = {*params.visible_special_token_ids, *self.formats.token_ids.values()}
            params = replace(params, visible_special_token_ids=sorted(visible))
        held_to = self._held_to(params.structured_outputs)
        return params if held_to is params.structured_outputs else replace(params, structured_outputs=held_to)

    def reader(self) -> AnswerReader:
        """The parser of one of the answers."""
        return AnswerReader(self)

    def call_id(self) -> str:
        """A new id for a call, such as the model's template takes."""
        num_chars = self.tool_format.call_id_chars if self.tool_format is not None else None
        if num_chars is None:
            return "call_" + _random_chars(_CALL_ID_CHARS)
        return _random_chars(num_chars)

    def blame(self, error: RequestError) -> RequestError:
        """An error about a generated grammar, expressed in terms of the request's fields."""
        if not self._has_grammar or not isinstance(error, InvalidRequestError) or not error.is_about(FIELD):
            return error
        reason = f"{error.reason or error.message:.400}"
        schema = self._format_field or "structured_outputs"
        if self.request is None:
            return InvalidRequestError(f"got a schema that can't be held to ({reason}). Change it.", field=schema)
        both = f" and {schema}" if self._has_schema else ""
        causes = [
            *(["strict"] if self.request.is_strict else []),
            *(["tool_choice"] if self.request.is_forced else []),
            *([schema] if self._has_schema else []),
        ]
        return InvalidRequestError(
            f"calls can't be held to the functions' parameters{both} ({reason}). Change parameters, or leave out "
            f"{' and '.join(causes)}.",
            field="tools",
        )

    def _held_to(self, asked: StructuredOutputs | None) -> StructuredOutputs | None:
        """The constraint on answers: calls, the requested output, or either; after reasoning."""
        request = self.request
        reasoning = self.formats.reasoning if self._may_reason and not self.is_reasoning_open else None
        if request is None or not (request.is_forced or request.is_strict or asked):
            if asked is None or reasoning is None or asked.kind not in _JSON_KINDS or asked.start_after is not None:
                return self._behind_reasoning(asked)
            return self._grammar(json_grammar(_schema(asked), self.formats.token_ids, reasoning))
        schema = None
        if asked is not None and not request.is_forced:
            if asked.kind not in _JSON_KINDS:
                other = self._format_field or f"structured_outputs.{asked.kind}"
                raise InvalidRequestError(
                    f"got functions and {other}, expected one of them. Remove one.", field="tools"
                )
            schema = _schema(asked)
            self._has_schema = True
        assert self.tool_format is not None
        held = Held.CALLS if request.is_forced else Held.PROPER if asked is None else Held.EITHER
        grammar = answer_grammar(
            self.tool_format,
            request.callable,
            self.formats.token_ids,
            held=held,
            is_parallel=request.is_parallel,
            schema=schema,
            reasoning=reasoning,
            is_behind_reasoning=self.is_reasoning_open,
        )
        return self._grammar(grammar)

    def _grammar(self, grammar: str) -> StructuredOutputs | None:
        self._has_grammar = True
        try:
            return self._behind_reasoning(StructuredOutputs(grammar=grammar))
        except RequestError as error:  # it is too long, or nested too deep
            raise self.blame(error) from None

    def _behind_reasoning(self, held_to: StructuredOutputs | None) -> StructuredOutputs | None:
        if held_to is None or not self.is_reasoning_open or held_to.start_after is not None:
            return held_to
        assert self.formats.reasoning is not None
        return replace(held_to, start_after=self.formats.reasoning.end)


class AnswerReader:
    """Parses one answer as it arrives, counts its tokens of reasoning, and gives its calls ids."""

    def __init__(self, plan: AnswerPlan) -> None:
        request = plan.request
        self._plan = plan
        self._parser = AnswerParser(
            reasoning=plan.formats.reasoning,
            is_reasoning_open=plan.is_reasoning_open,
            tool_format=plan.tool_format,
            tools=None if request is None else request.callable,
            max_calls=None if request is None or request.is_parallel else 1,
            is_forced=request is not None and request.is_forced,
        )
        self._reasoning: list[str] = []
        self._num_tokens = 0
        self._has_end = False
        self.call_ids: list[str] = []
        """Of the calls so far."""

    def push(self, output: CompletionOutput) -> list[Event]:
        """Take more of the answer: its text and tokens; returns the events in it."""
        self._count(output.token_ids)
        events = self._parser.push(output.text)
        if output.finished:
            events += self._parser.finish(is_cut=output.is_cut)
        for event in events:
            if isinstance(event, Reasoning):
                self._reasoning.append(event.text)
            elif isinstance(event, ToolCallStart):
                self.call_ids.append(self._plan.call_id())
        return events

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens of reasoning, with the one that ends it."""
        if not self._reasoning:
            return 0
        if self._plan.formats.reasoning_end_id() is not None:
            return self._num_tokens
        return len(self._plan.tokenizer.encode("".join(self._reasoning), add_special_tokens=False))

    def _count(self, token_ids: Sequence[int]) -> None:
        end_id = self._plan.formats.reasoning_end_id()
        for token_id in token_ids:
            if self._has_end:
                return
            self._num_tokens += 1
            self._has_end = token_id == end_id


def _schema(asked: StructuredOutputs) -> Any:
    return json.loads(asked.json) if isinstance(asked.json, str) else {"type": "object"}


def _random_chars(count: int) -> str:
    return "".join(secrets.choice(_LETTERS_AND_DIGITS) for _ in range(count))
