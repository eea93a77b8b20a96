"""Turns the core's outputs into those that callers get: joins tokens, text, log probabilities and times by request.

A request with `n` outputs runs in the core as `n` requests of their own, its *children*; here they become one
again. Owns the text side of every request in flight. Used by one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from sensorium.engine.detokenizer import Detokenizer, IncrementalDetokenizer
from sensorium.errors import InvalidRequestError, RequestError
from sensorium.messages import EngineOutput, EngineRequest, FinishReason, RequestFailure, TokenLogprobs
from sensorium.outputs import (
    CompletionOutput,
    Logprob,
    OutputKind,
    PoolingOutput,
    PoolingRequestOutput,
    PositionLogprobs,
    RequestMetrics,
    RequestOutput,
)

if TYPE_CHECKING:
    from sensorium.inputs.preprocess import ProcessedRequest

Spelling: TypeAlias = Callable[[int], tuple[str | None, bytes | None]]
"""A token's text and bytes, by its id."""


@dataclass(frozen=True, slots=True, eq=False)
class ProcessedOutputs:
    """The result of one round of core outputs."""

    outputs: list[RequestOutput | PoolingRequestOutput]
    abort_ids: list[str]
    """Core requests to abort: a stop string ended them, or another child failed."""


class OutputProcessor:
    """Makes the outputs of all requests in flight.

    Every request that was added ends in exactly one output with `finished`, unless it is removed before. Core outputs
    of requests that are not in flight are ignored: the core may have sent them before it received an abort.
    """

    def __init__(self, tokenizer: Any | None, clock: Callable[[], float] = time.monotonic) -> None:
        """`tokenizer`: a Hugging Face tokenizer; without one, outputs have no text. `clock` gives seconds."""
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._clock = clock
        self._requests: dict[str, _Request] = {}
        self._children: dict[str, _Child] = {}
        """The unfinished ones, by their id in the core."""

    def add_request(self, processed: ProcessedRequest, kind: OutputKind = OutputKind.CUMULATIVE) -> list[EngineRequest]:
        """Take a request in; returns the requests for the core, one per output.

        A request with one output keeps its id; the children of others are `<id>#0`, `<id>#1` and so on.

        Raises:
            InvalidRequestError: The id is in use, or stop strings are asked for without a tokenizer.
        """
        message = processed.engine_request
        params = message.sampling_params
        if self._detokenizer is None and params.stop:
            raise InvalidRequestError(
                "got stop strings, expected none where the tokenizer was skipped. "
                "Use stop_token_ids, or set skip_tokenizer_init to false.",
                field="stop",
            )
        parent_id, num_outputs = message.request_id, params.n if message.pooling is None else 1
        ids = [parent_id] if num_outputs == 1 else [f"{parent_id}#{i}" for i in range(num_outputs)]
        if self.has_request(parent_id) or any(child_id in self._children for child_id in ids):
            raise InvalidRequestError(
                f"got {parent_id!r}, expected an id that is not in use. Change it.", field="request_id"
            )
        request = _Request(processed, kind, self._clock())
        for index, child_id in enumerate(ids):
            child = _Child(child_id, index, request, self._detokenizer if params.detokenize else None)
            request.children.append(child)
            request.num_running += 1
            self._children[child_id] = child
        self._requests[parent_id] = request
        return [
            replace(message, request_id=child_id, sampling_params=params.for_output(index))
            for index, child_id in enumerate(ids)
        ]

    def has_request(self, request_id: str) -> bool:
        """Whether a request is in flight."""
        return request_id in self._requests

    @property
    def num_requests(self) -> int:
        """Requests in flight."""
        return len(self._requests)

    def core_ids(self, request_id: str) -> list[str]:
        """Ids under which the request still runs in the core; aborted there, its outputs end with "abort"."""
        request = self._requests.get(request_id)
        return [] if request is None else [child.child_id for child in request.children if not child.is_finished]

    def remove_request(self, request_id: str) -> None:
        """Forget a request; no output of it follows. Ids that are unknown or finished are ignored."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            for child in request.children:
                if self._children.get(child.child_id) is child:
                    del self._children[child.child_id]

    def abort(self, request_id: str) -> list[str]:
        """Forget a request whose caller no longer wants it; returns the ids to abort in the core."""
        core_ids = self.core_ids(request_id)
        self.remove_request(request_id)
        return core_ids

    def process(self, core_outputs: Sequence[EngineOutput]) -> ProcessedOutputs:
        """Turn a round of core outputs into outputs, one for each request that changed."""
        now_s = self._clock()
        abort_ids: list[str] = []
        touched: dict[str, _Request] = {}
        for each in core_outputs:
            child = self._children.get(each.request_id)
            if child is None:
                continue
            request = child.request
            request.update(each, now_s, self._spelling)
            child.update(each, self._spelling)
            if child.is_finished:
                del self._children[child.child_id]
                if each.finish_reason is None:
                    abort_ids.append(child.child_id)
            if each.failure is not None:
                for sibling in request.fail(each.failure):
                    del self._children[sibling]
                    abort_ids.append(sibling)
            if child.has_news:
                touched[request.request_id] = request
        outputs = [output for request in touched.values() if (output := self._output(request, now_s)) is not None]
        return ProcessedOutputs(outputs, abort_ids)

    def _spelling(self, token_id: int) -> tuple[str | None, bytes | None]:
        if self._detokenizer is None:
            return None, None
        return self._detokenizer.token_text(token_id), self._detokenizer.token_bytes(token_id)

    def _output(self, request: _Request, now_s: float) -> RequestOutput | PoolingRequestOutput | None:
        finished = request.is_finished
        if finished:
            request.finished_time_s = now_s
            self.remove_request(request.request_id)
        elif request.kind is OutputKind.FINAL_ONLY:
            return None
        if request.message.pooling is not None:
            return request.pooling_output() if finished else None
        return request.output()


class _Request:
    """A request in flight: what its outputs share."""

    def __init__(self, processed: ProcessedRequest, kind: OutputKind, now_s: float) -> None:
        self.processed = processed
        self.message = processed.engine_request
        self.request_id = self.message.request_id
        self.kind = kind
        self.children: list[_Child] = []
        self.num_running = 0
        self.error: RequestError | None = None
        self.finished_time_s: float | None = None
        self._pooled: Any = None
        wants_prompt_logprobs = self.message.sampling_params.prompt_logprobs is not None
        self._prompt_logprobs: list[PositionLogprobs | None] | None = [None] if wants_prompt_logprobs else None
        self._num_cached_tokens = 0
        self._queued_time_s = now_s
        self._scheduled_time_s: float | None = None
        self._first_token_time_s: float | None = None
        self._last_token_time_s: float | None = None

    @property
    def is_finished(self) -> bool:
        return self.num_running == 0

    def update(self, output: EngineOutput, now_s: float, spelling: Spelling) -> None:
        """Store what concerns the request as a whole."""
        if self._scheduled_time_s is None:
            self._scheduled_time_s = output.scheduled_time_s
        if output.new_token_ids:
            if self._first_token_time_s is None:
                self._first_token_time_s = now_s
            self._last_token_time_s = now_s
        if self._prompt_logprobs is not None:
            # Rank 0 stands for ids outside the vocabulary, where media go.
            self._prompt_logprobs += [_position(e, spelling) if e.rank else None for e in output.prompt_logprobs]
        if output.pooled is not None:
            self._pooled = output.pooled
        self._num_cached_tokens = max(self._num_cached_tokens, output.num_cached_tokens)

    def fail(self, failure: RequestFailure) -> list[str]:
        """Set the error and end the outputs that still run; returns their ids."""
        kind = InvalidRequestError if failure.status == InvalidRequestError.status else RequestError
        self.error = kind(failure.message, code=failure.code, field=failure.field, reason=failure.reason)
        self.error.status = failure.status
        running = [child for child in self.children if not child.is_finished]
        for child in running:
            child.end(FinishReason.ABORT)
        return [child.child_id for child in running]

    def output(self) -> RequestOutput:
        is_delta = self.kind is OutputKind.DELTA
        prompt_logprobs = self._prompt_logprobs
        if is_delta and prompt_logprobs is not None:
            # They go out once, whole: with the first output's first token. Others may be ahead of it.
            if len(prompt_logprobs) == len(self.message.prompt_token_ids):
                self._prompt_logprobs = None
            else:
                prompt_logprobs = None
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.processed.prompt_text,
            prompt_token_ids=self.message.prompt_token_ids,
            outputs=[child.completion(is_delta=is_delta) for child in self.children if child.has_news or not is_delta],
            finished=self.is_finished,
            prompt_logprobs=prompt_logprobs,
            metrics=self._metrics(),
            num_cached_tokens=self._num_cached_tokens,
            media_token_counts=self.processed.media_token_counts,
            error=self.error,
        )

    def pooling_output(self) -> PoolingRequestOutput:
        return PoolingRequestOutput(
            request_id=self.request_id,
            outputs=None if self._pooled is None else PoolingOutput(self._pooled),
            prompt_token_ids=self.message.prompt_token_ids,
            finished=True,
            metrics=self._metrics(),
            num_cached_tokens=self._num_cached_tokens,
            media_token_counts=self.processed.media_token_counts,
            error=self.error,
        )

    def _metrics(self) -> RequestMetrics:
        return RequestMetrics(
            self.message.arrival_time_s,
            self._queued_time_s,
            self._scheduled_time_s,
            self._first_token_time_s,
            self._last_token_time_s,
            self.finished_time_s,
        )


class _Child:
    """One output of a request."""

    def __init__(self, child_id: str, index: int, request: _Request, detokenizer: Detokenizer | None) -> None:
        params = request.message.sampling_params
        self.child_id = child_id
        self.request = request
        self.has_news = False
        """Whether something happened that `completion` hasn't shown yet."""
        self._index = index
        self._keeps_stop = params.include_stop_str_in_output
        self._text = (
            None
            if detokenizer is None
            else IncrementalDetokenizer(detokenizer, request.message.prompt_token_ids, params)
        )
        self._token_ids: list[int] = []
        self._logprobs: list[PositionLogprobs] | None = None if params.logprobs is None else []
        self._cumulative_logprob = 0.0
        self._finish_reason: FinishReason | None = None
        self._stop_reason: int | str | None = None
        self._num_shown_tokens = 0
        self._num_shown_chars = 0

    @property
    def is_finished(self) -> bool:
        return self._finish_reason is not None

    def update(self, output: EngineOutput, spelling: Spelling) -> None:
        """Take in new tokens, up to one that completes a stop string, and the end."""
        num_tokens = len(output.new_token_ids)
        if self._text is not None and num_tokens:
            # The token that ended the output is no part of its text.
            is_stop = output.finish_reason is FinishReason.STOP and not self._keeps_stop
            num_tokens = self._text.update(output.new_token_ids[:-1] if is_stop else output.new_token_ids)
            num_tokens += is_stop and not self._has_met_stop_string
        self._token_ids += output.new_token_ids[:num_tokens]
        if self._logprobs is not None:
            for entry in output.logprobs[:num_tokens]:
                self._logprobs.append(_position(entry, spelling))
                self._cumulative_logprob += entry.logprob
        self.has_news |= num_tokens > 0
        if output.finish_reason is not None or self._has_met_stop_string:
            self.end(output.finish_reason or FinishReason.STOP, output.stop_reason)

    def end(self, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        if self._text is not None:
            self._text.finish()
            if self._text.stop_string is not None:
                reason, stop_reason = FinishReason.STOP, self._text.stop_string
        self._finish_reason, self._stop_reason = reason, stop_reason
        self.request.num_running -= 1
        self.has_news = True

    def completion(self, *, is_delta: bool) -> CompletionOutput:
        """The output from its beginning, or what it has beyond the last such call."""
        text = "" if self._text is None else self._text.text
        first_token, first_char = (self._num_shown_tokens, self._num_shown_chars) if is_delta else (0, 0)
        self._num_shown_tokens, self._num_shown_chars = len(self._token_ids), len(text)
        self.has_news = False
        return CompletionOutput(
            index=self._index,
            text=text[first_char:],
            token_ids=self._token_ids[first_token:],
            cumulative_logprob=None if self._logprobs is None else self._cumulative_logprob,
            logprobs=None if self._logprobs is None else self._logprobs[first_token:],
            finish_reason=None if self._finish_reason is None else self._finish_reason.value,
            stop_reason=self._stop_reason,
            text_offsets=None if self._logprobs is None else self._offsets(first_token),
        )

    def _offsets(self, first_token: int) -> list[int]:
        """Where tokens from one on begin in the text. What ended the output without being shown begins at its end."""
        end = 0 if self._text is None else len(self._text.text)
        known = [] if self._text is None else self._text.token_offsets[first_token:]
        return known + [end] * (len(self._token_ids) - first_token - len(known))

    @property
    def _has_met_stop_string(self) -> bool:
        return self._text is not None and self._text.stop_string is not None


def _position(entry: TokenLogprobs, spelling: Spelling) -> PositionLogprobs:
    position = {entry.token_id: Logprob(entry.logprob, entry.rank, *spelling(entry.token_id))}
    for rank, (token_id, logprob) in enumerate(zip(entry.top_token_ids, entry.top_logprobs, strict=True), 1):
        if token_id != entry.token_id:
            position[token_id] = Logprob(logprob, rank, *spelling(token_id))
    return position
