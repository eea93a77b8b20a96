"""Takes in what a step brought: tokens, failures, computed blocks; decides who is finished.

Owns nothing; changes requests through the table and the cache managers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sensorium.messages import (
    EngineOutput,
    FinishReason,
    ModelRunnerOutput,
    RequestFailure,
    ScheduledChunk,
    TokenLogprobs,
)
from sensorium.scheduler.encoder_cache_manager import EncoderCacheManager
from sensorium.scheduler.kv_cache_manager import KVCacheManager
from sensorium.scheduler.request import RequestState
from sensorium.scheduler.request_table import RequestTable
from sensorium.scheduler.stats import Counters
from sensorium.scheduler.step_plan import StepPlan

NO_RESULT = RequestFailure("The engine lost the result of this request. Send it again.")


class StepResults:
    """Applies results to requests. Those of a request that ended or was preempted while the step was in flight are
    ignored."""

    def __init__(
        self, table: RequestTable, kv_cache: KVCacheManager, encoder_cache: EncoderCacheManager, counters: Counters
    ) -> None:
        self._counters = counters
        self._table = table
        self._kv_cache = kv_cache
        self._encoder_cache = encoder_cache

    def apply(self, plan: StepPlan, result: ModelRunnerOutput) -> list[EngineOutput]:
        """The outputs of a step's requests, in the order of its chunks."""
        outputs = []
        for (request, chunk), num_departures in zip(plan.chunks.items(), plan.num_departures, strict=True):
            failure = result.failures.get(request.request_id) if result.failures else None
            if request.num_departures != num_departures:
                if failure is not None:  # what it was to encode is not there
                    self._encoder_cache.drop(item.key for item in request.message.media)
                continue
            output = self._fail(request, failure) if failure is not None else self._advance(request, chunk, result)
            if output is not None:
                outputs.append(output)
        return outputs

    def _advance(self, request: RequestState, chunk: ScheduledChunk, result: ModelRunnerOutput) -> EngineOutput | None:
        """Count a chunk as settled, and take in what was sampled after it. None: no output."""
        num_drafts = len(chunk.draft_token_ids)
        request.num_settled_tokens = chunk.num_computed_tokens + chunk.num_scheduled_tokens - num_drafts
        prompt_logprobs: Sequence[TokenLogprobs] = ()
        if result.prompt_logprobs:
            prompt_logprobs = self._take_prompt_logprobs(request, chunk, result)
        if not chunk.is_last:
            self._settle(request)
            return self._output(request, prompt_logprobs=prompt_logprobs) if prompt_logprobs else None
        if request.pooling:
            return self._finish_pooling(request, result)
        if result.complete_request_ids and request.request_id in result.complete_request_ids:
            self._table.finish(request)
            return self._output(request, prompt_logprobs=prompt_logprobs, finish_reason=FinishReason.STOP)
        sampled = result.sampled_token_ids.get(request.request_id)
        if not sampled:
            return self._fail(request, NO_RESULT)
        request.num_pending_tokens -= 1 + num_drafts
        num_new, reason, stop_reason = _append(request, sampled)
        if num_drafts:
            self._settle_drafts(request, num_drafts, len(sampled) - 1, num_new - 1)
        self._settle(request)
        logprobs = result.logprobs.get(request.request_id, ()) if result.logprobs else ()
        if reason is not None:
            self._table.finish(request)
        return EngineOutput(
            request.request_id,
            sampled if num_new == len(sampled) else sampled[:num_new],
            logprobs[:num_new],
            prompt_logprobs,
            reason,
            stop_reason,
            None,
            request.num_cached_tokens,
            request.scheduled_time_s,
        )

    def _settle_drafts(self, request: RequestState, num_drafts: int, num_right: int, num_kept: int) -> None:
        """Count the drafts that were right as settled, as far as the output goes, and take the others back.

        Worked example: of a request with 10 tokens, one step computes the last and 3 drafts, so that 13 count as
        computed, 9 as settled and 4 as pending. The first draft was right: 2 tokens are new, and 11 of 12 are computed.
        """
        assert request.guesses is not None
        request.guesses.settle(num_drafts, num_right)
        request.num_settled_tokens += num_kept
        request.num_computed_tokens -= num_drafts - num_kept
        self._counters.num_draft_tokens += num_drafts
        self._counters.num_accepted_tokens += num_right

    def _settle(self, request: RequestState) -> None:
        """Offer full blocks to others, and release what is not needed any more."""
        self._kv_cache.settled(request)
        if request.held_media:
            self._table.release_computed_media(request)

    def _take_prompt_logprobs(
        self, request: RequestState, chunk: ScheduledChunk, result: ModelRunnerOutput
    ) -> Sequence[TokenLogprobs]:
        """The prompt's log probabilities of a chunk that didn't go out before a preemption."""
        entries = result.prompt_logprobs.get(request.request_id, ())
        num_sent = request.num_prompt_logprobs
        request.num_prompt_logprobs = max(num_sent, chunk.num_computed_tokens + len(entries))
        return entries[max(num_sent - chunk.num_computed_tokens, 0) :]

    def _finish_pooling(self, request: RequestState, result: ModelRunnerOutput) -> EngineOutput:
        pooled = result.pooled.get(request.request_id)
        if pooled is None:
            return self._fail(request, NO_RESULT)
        self._settle(request)
        self._table.finish(request)
        return self._output(request, finish_reason=FinishReason.STOP, pooled=pooled)

    def _fail(self, request: RequestState, failure: RequestFailure) -> EngineOutput:
        self._table.finish(request, has_failed=True)
        return self._output(request, finish_reason=FinishReason.ERROR, failure=failure)

    @staticmethod
    def _output(request: RequestState, **fields: Any) -> EngineOutput:
        return EngineOutput(
            request.request_id,
            num_cached_tokens=request.num_cached_tokens,
            scheduled_time_s=request.scheduled_time_s,
            **fields,
        )


def _append(request: RequestState, sampled: Sequence[int]) -> tuple[int, FinishReason | None, int | None]:
    """Append sampled tokens up to one that ends the output; how many, and how it ended."""
    token_ids, stop = request.token_ids, request.stop
    for num_new, token_id in enumerate(sampled, 1):
        token_ids.append(token_id)
        end = stop.check(token_id, len(token_ids))
        if end is not None:
            return num_new, *end
    return len(sampled), None, None
