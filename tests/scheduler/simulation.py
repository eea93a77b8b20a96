"""Runs a scheduler against the fake worker through arrivals, aborts and failures, and checks what must always hold."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from sensorium.cache_spec import CacheGroup, CacheKind
from sensorium.config import CacheConfig, ModelFeatures, SchedulerConfig
from sensorium.errors import OverloadedError
from sensorium.messages import (
    EngineOutput,
    EngineRequest,
    FinishReason,
    MediaItem,
    ModelRunnerOutput,
    SchedulerOutput,
    TokenLogprobs,
)
from sensorium.pooling_params import PoolingParams
from sensorium.sampling_params import SamplingParams
from sensorium.scheduler import Scheduler
from sensorium.scheduler.pacing import Pacer
from sensorium.spans import Span, two_way_spans
from tests.scheduler.fake_worker import (
    EOS,
    VOCAB_SIZE,
    FakeWorker,
    TrueSequence,
    expected_output,
    expected_prompt_logprobs,
    next_token,
    step_hash,
)

Parts = Sequence[Sequence[Any]]
"""Of a prompt: lists of token ids, and media as `(key, mask of rows)`."""

PLACEHOLDER = -3
SEPARATOR = 41


def make_item(key: str, offset: int, mask: Sequence[bool]) -> MediaItem:
    return MediaItem("image", key, Span.of_mask(offset, mask))


def item_tokens(mask: Sequence[bool]) -> list[int]:
    return [PLACEHOLDER if is_row else SEPARATOR for is_row in mask]


def build_prompt(parts: Parts) -> tuple[list[int], tuple[MediaItem, ...]]:
    """Token ids and media of a prompt."""
    tokens: list[int] = []
    media = []
    for part in parts:
        if isinstance(part, tuple):
            key, mask = part
            media.append(make_item(key, len(tokens), mask))
            tokens += item_tokens(mask)
        else:
            tokens += list(part)
    return tokens, tuple(media)


def make_request(
    request_id: str,
    parts: Parts,
    *,
    max_tokens: int | None = 4,
    priority: int = 0,
    tenant: str = "",
    pooling: bool = False,
    cache_salt: str | None = None,
    two_way: frozenset[str] = frozenset(),
    **params: object,
) -> EngineRequest:
    tokens, media = build_prompt(parts)
    return EngineRequest(
        request_id,
        tokens,
        SamplingParams(max_tokens=max_tokens, **params),  # type: ignore[arg-type]
        frozenset({EOS}),
        media,
        two_way_spans=two_way_spans(two_way, [((item.modality,), item.span) for item in media], len(tokens)),
        priority=priority,
        tenant=tenant,
        pooling=PoolingParams() if pooling else None,
        cache_salt=cache_salt,
    )


def full_attention(num_blocks: int, block_size: int) -> tuple[CacheGroup, ...]:
    """The cache groups of a model in which every layer keeps everything."""
    return (CacheGroup(CacheKind.FULL, num_blocks, block_size),)


@dataclass
class Limits:
    """What the checks compare with; the same values that the scheduler got."""

    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    features: ModelFeatures = field(default_factory=ModelFeatures)
    num_blocks: int = 64
    max_model_len: int = 512
    cache_groups: tuple[CacheGroup, ...] = ()
    """Empty: one of full attention with `num_blocks` blocks."""

    @property
    def groups(self) -> tuple[CacheGroup, ...]:
        return self.cache_groups or full_attention(self.num_blocks, self.cache.block_size)


@dataclass
class Outcome:
    token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    final: EngineOutput | None = None


class KnowingDrafter:
    """Knows how a request goes on, and says it, with a wrong token now and then."""

    def __init__(self, request: EngineRequest, max_drafts: int, share_right: float, rng: Random) -> None:
        self._share_right = share_right
        self._sequence = TrueSequence(request)
        self._max_drafts = max_drafts
        self._rng = rng

    def propose(self, token_ids: Sequence[int]) -> list[int]:
        sequence = self._sequence
        assert sequence.token_ids == list(token_ids[: len(sequence.token_ids)])
        sequence.token_ids += token_ids[len(sequence.token_ids) :]
        state = sequence.state(len(token_ids) - 1)
        drafts: list[int] = []
        for _ in range(self._rng.randint(0, self._max_drafts)):
            right = next_token(state)
            drafts.append(right if self._rng.random() < self._share_right else (right + 1) % VOCAB_SIZE)
            state = step_hash(state, (0, drafts[-1], 0))
        return drafts


class Simulation:
    """Invariants are checked after every step; `finish` checks the outcome of every request."""

    def __init__(
        self,
        limits: Limits,
        *,
        seed: int = 0,
        max_drafts: int = 0,
        share_right: float = 0.8,
        failure_rate: float = 0.0,
        pacer: Pacer | None = None,
    ) -> None:
        rng = Random(seed + 1)
        self.limits = limits
        self.scheduler = Scheduler(
            limits.scheduler,
            limits.cache,
            limits.features,
            cache_groups=limits.groups,
            max_model_len=limits.max_model_len,
            pacer=pacer,
            make_drafter=(lambda request: KnowingDrafter(request, max_drafts, share_right, rng))
            if max_drafts
            else None,
        )
        self.worker = FakeWorker(
            limits.groups,
            max_num_seqs=limits.scheduler.max_num_seqs,
            splits_media=limits.features.splits_media,
            keeps_items_whole=limits.features.atomic_items,
            max_drafts=max_drafts,
            failure_rate=failure_rate,
            rng=Random(seed),
        )
        self.requests: dict[str, EngineRequest] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.steps: list[SchedulerOutput] = []
        self._in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self._last_step_was_for_one = False

    def add(self, request: EngineRequest) -> bool:
        """Add a request; False if the line is full."""
        try:
            self.scheduler.add_request(request)
        except OverloadedError:
            return False
        self.requests[request.request_id] = request
        self.outcomes[request.request_id] = Outcome()
        return True

    def abort(self, request_ids: Sequence[str]) -> None:
        for output in self.scheduler.abort(request_ids):
            assert output.finish_reason is FinishReason.ABORT
            self._take(output)

    def step(self, abort_in_flight: Sequence[str] = ()) -> SchedulerOutput:
        """Submit what may be in flight and take in one result; some requests may be aborted in between.

        Returns the step whose result came in.
        """
        while len(self._in_flight) < self.limits.scheduler.max_steps_in_flight and self._submit():
            pass
        self.abort(abort_in_flight)
        step, result = self._in_flight.popleft()
        for output in self.scheduler.update(step, result):
            self._take(output)
        self.scheduler.check()
        return step

    def _submit(self) -> bool:
        had_work = self.scheduler.has_unfinished_requests()
        step = self.scheduler.schedule()
        self.scheduler.check()
        if step is None:
            assert self._in_flight, "a step may be left out only while others are in flight"
            return False
        assert bool(step.chunks) == had_work, "a step is empty if and only if there is nothing to do"
        self._check_budgets(step)
        self._check_streams(step)
        self._in_flight.append((step, self.worker.execute(step)))
        self._check_encoder_rows(step)
        self.steps.append(step)
        return bool(step.chunks)

    def run(self, max_steps: int = 10_000) -> None:
        """Step until nothing is left."""
        for _ in range(max_steps):
            if not self.scheduler.has_unfinished_requests():
                return
            self.step()
        raise AssertionError(f"not finished after {max_steps} steps: {self.scheduler.stats()}")

    def finish(self, max_steps: int = 10_000) -> None:
        """Run to the end and check that every request got what it gets alone, and that nothing is left over."""
        self.run(max_steps)
        while self._in_flight or self.scheduler.has_releases:
            self.step()
        assert not self.scheduler.has_releases
        self.scheduler.check_idle()
        assert not self.worker.slots
        assert sum(map(len, self.worker.rows.values())) == self.scheduler.stats().num_encoder_cache_rows
        for request_id in self.requests:
            self.check_outcome(request_id)

    def check_outcome(self, request_id: str) -> None:
        request, outcome = self.requests[request_id], self.outcomes[request_id]
        assert outcome.final is not None, f"{request_id} has no final output"
        reason = outcome.final.finish_reason
        is_bad = any(item.key.startswith("bad") for item in request.media)
        # A fault in a step that was in flight when its request ended, or was preempted, is nobody's.
        is_noticed = self.limits.scheduler.max_steps_in_flight == 1
        if is_bad or (request_id in self.worker.injected and is_noticed):
            assert reason in (FinishReason.ERROR, FinishReason.ABORT)
        elif request_id not in self.worker.injected:
            assert reason is not FinishReason.ERROR, f"{request_id} failed for another's fault"
        if request.pooling:
            assert not outcome.token_ids
            if reason is FinishReason.STOP:
                assert outcome.final.pooled == TrueSequence(request).state(len(request.prompt_token_ids) - 1)
            return
        expected = expected_output(request, self.limits.max_model_len)
        wants_prompt = request.sampling_params.prompt_logprobs is not None
        prompt = expected_prompt_logprobs(request) if wants_prompt else []
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert outcome.token_ids == expected
            assert outcome.prompt_logprobs == prompt
        else:
            assert outcome.token_ids == expected[: len(outcome.token_ids)]
            assert outcome.prompt_logprobs == prompt[: len(outcome.prompt_logprobs)]

    def _take(self, output: EngineOutput) -> None:
        outcome = self.outcomes[output.request_id]
        assert outcome.final is None, f"{output.request_id} has news after its final output"
        outcome.token_ids += output.new_token_ids
        outcome.prompt_logprobs += output.prompt_logprobs
        if output.finish_reason is not None:
            outcome.final = output

    def _check_budgets(self, step: SchedulerOutput) -> None:
        config = self.limits.scheduler
        if step.num_scheduled_tokens > config.max_num_batched_tokens:
            assert len(step.chunks) == 1, "more than the budget only for a chunk that runs alone"
            assert not config.enable_chunked_prefill or self.worker.keeps_items_whole
        is_alone = len(step.chunks) == 1 and not config.enable_chunked_prefill
        rows = [self.requests[each.request_id].media[each.item].num_rows for each in step.encoder_inputs]
        assert sum(rows) <= config.max_num_encoder_rows or len(rows) == 1 or is_alone

    def _check_streams(self, step: SchedulerOutput) -> None:
        """Every stream has its token in every step, unless the step is for one request or all blocks are in use."""
        slots = self.worker.slots
        streams = {request_id for request_id, slot in slots.items() if slot.has_sampled}
        missing = streams - {chunk.request_id for chunk in step.chunks} - set(step.freed_request_ids)
        unfinished = self.scheduler._table.by_id
        missing = {name for name in missing if name in unfinished and not unfinished[name].awaits_result}
        if missing and self._has_free_blocks():
            may_run_alone = self.worker.keeps_items_whole or bool(self.limits.features.two_way)
            may_run_alone |= not self.limits.scheduler.enable_chunked_prefill
            assert may_run_alone, f"streams without a token: {missing}"
            assert len(step.chunks) == 1
            assert not self._last_step_was_for_one, "two steps without the streams"
            self._last_step_was_for_one = True
        else:
            self._last_step_was_for_one = False

    def _has_free_blocks(self) -> bool:
        managers = self.scheduler._kv_cache.paged
        if any(each.pool.num_blocks < self.limits.num_blocks for each in managers):
            return False  # what a window gives back at the end of a step, it may have lacked before
        return all(each.pool.num_free for each in managers)

    def _check_encoder_rows(self, step: SchedulerOutput) -> None:
        config = self.limits.scheduler
        capacity = self.limits.cache.encoder_cache_rows
        if capacity is None:
            capacity = 4 * config.max_num_encoder_rows
        # What a step for one request encoded is held until its result is in.
        steps = [step, *(each for each, _ in self._in_flight)]
        is_alone = any(len(each.chunks) == 1 for each in steps) and not config.enable_chunked_prefill
        rows = self.worker.rows
        if self.limits.features.two_way:  # items of one span are held together, though a step may encode no more
            capacity = max(capacity, 2 * config.max_num_encoder_rows)
        assert sum(map(len, rows.values())) <= capacity or len(rows) == 1 or is_alone
