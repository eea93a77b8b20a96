"""Decides what a step computes: one token budget, no phases; computed tokens catch up with known ones.

Requests that stream come first, with the token that each sampled last. Then, in the order of the policy, prefills that
have begun and waiting requests. What is left may go to drafts, guesses of how the streams go on. A request that lacks
KV blocks, or room in the encoder cache, takes them from the worst running request behind it; the worst itself waits. So
the best request can always run, and every other in its turn. Drafts take nothing from anyone.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Collection, Sequence

from sensorium.config import SchedulerConfig
from sensorium.messages import NewRequest
from sensorium.scheduler.chunking import ChunkDraft, ChunkPlanner, Shortage
from sensorium.scheduler.kv_cache_manager import KVCacheManager, PrefixHit
from sensorium.scheduler.pacing import Pacer
from sensorium.scheduler.request import RequestState, RequestStatus
from sensorium.scheduler.request_table import RequestTable, by_order, may_displace
from sensorium.scheduler.stats import Counters
from sensorium.scheduler.step_plan import StepPlan


class _Admission(enum.Enum):
    ADMITTED = enum.auto()
    REFUSED = enum.auto()
    HELD_BACK = enum.auto()
    """Passed over in this step, in its own interest."""


MAX_HELD_BACK = 16
"""Most requests skipped in one step because another computes their prefix; bounds the host's work."""


class StepPlanner:
    """Puts steps together. From call to call it remembers only whether the last step was for one request alone."""

    def __init__(
        self,
        config: SchedulerConfig,
        table: RequestTable,
        kv_cache: KVCacheManager,
        chunks: ChunkPlanner,
        pacer: Pacer,
        counters: Counters,
        *,
        max_loras: int | None = None,
        gives_drafts: bool = False,
    ) -> None:
        self._gives_drafts = gives_drafts
        self._max_loras = max_loras
        self._max_num_tokens = config.max_num_batched_tokens
        self._max_num_rows = config.max_num_encoder_rows
        self._max_num_running = config.max_num_seqs
        self._table = table
        self._kv_cache = kv_cache
        self._chunks = chunks
        self._pacer = pacer
        self._counters = counters
        self._last_was_alone = False
        self._in_flight: Collection[StepPlan] = ()

    def plan(self, in_flight: Collection[StepPlan] = ()) -> StepPlan:
        """The next step. It is empty only if there is no request, or all wait for what the steps in flight bring."""
        self._in_flight = in_flight
        plan = self._plan_alone() if self._chunks.may_exceed_budget else None
        self._last_was_alone = plan is not None
        if plan is None:
            plan = StepPlan(self._max_num_tokens, self._max_num_rows)
            self._add_decodes(plan)
            has_streams = bool(plan.chunks) or any(request.is_caught_up for request in self._table.running)
            plan.pace = self._pacer.begin_step(has_streams=has_streams)
            self._add_prefills(plan)
            if self._gives_drafts:
                self._add_drafts(plan)
        return plan

    # Streams

    def _add_decodes(self, plan: StepPlan) -> None:
        """The tokens that running requests sampled last, best request first."""
        running = self._table.running
        i = 0
        # By index: a victim always stands behind the request that takes its blocks.
        while i < len(running) and plan.tokens_left:
            request = running[i]
            i += 1
            if not request.is_caught_up or request.awaits_result:
                continue
            num_tokens = min(request.num_expected_tokens - request.num_computed_tokens, plan.tokens_left)
            end = request.num_computed_tokens + num_tokens
            if end <= request.num_allocated_tokens:
                plan.add_chunk(request, num_tokens, ())
            elif self._free_blocks_for(request, end, plan):
                plan.add_chunk(request, num_tokens, self._kv_cache.allocate(request, end))

    def _add_drafts(self, plan: StepPlan) -> None:
        """Guesses of the tokens that streams go on with, best request first: as many as there are tokens, time and
        blocks for that nothing else in the step needs."""
        num_spare = plan.pace.spare_tokens()
        for request in list(plan.chunks):
            if request.guesses is None or not request.is_caught_up:
                continue
            room = min(plan.tokens_left, num_spare - plan.num_draft_tokens)
            if room <= 0:
                return
            most = min(room, request.max_drafts, self._kv_cache.max_tokens(request) - request.num_expected_tokens)
            drafts = request.guesses.propose(request.token_ids, most) if most > 0 else ()
            if drafts:
                end = request.num_expected_tokens + len(drafts)
                plan.add_drafts(request, drafts, self._kv_cache.allocate(request, end))

    def _free_blocks_for(self, request: RequestState, num_tokens: int, plan: StepPlan) -> bool:
        """Preempt worse requests until the request's table can hold `num_tokens`."""
        while self._kv_cache.max_tokens(request) < num_tokens:
            if not self._preempt_for(request, Shortage.BLOCKS, plan):
                return False
        return True

    # Memory

    def _preempt_for(self, request: RequestState, shortage: Shortage, plan: StepPlan) -> bool:
        """Preempt the worst running request that this one may displace and that has what is short.

        If there is none, no request behind this one may take more of it.
        """
        for victim in reversed(self._table.running):
            if not may_displace(request, victim):
                break
            if shortage is Shortage.BLOCKS or victim.held_media:
                plan.cancel(victim)
                plan.is_admission_closed = True
                self._table.preempt(victim)
                return True
        if shortage is Shortage.BLOCKS:
            plan.is_admission_closed = True
        else:
            plan.is_encoder_closed = True
        return False

    # Prefills

    def _add_prefills(self, plan: StepPlan) -> None:
        """Prefills that have begun and waiting requests, merged in the order of the policy."""
        begun = [request for request in self._table.running if not request.is_caught_up]
        i = num_held_back = 0
        while plan.tokens_left:
            running = begun[i] if i < len(begun) else None
            is_closed = plan.is_admission_closed or num_held_back == MAX_HELD_BACK
            waiting = None if is_closed else self._table.waiting.peek(num_held_back)
            if running is not None and (waiting is None or running.order < waiting.order):
                i += 1
                if running.status is RequestStatus.RUNNING:
                    self._advance(running, plan)
            elif waiting is None:
                return
            elif self._consider(waiting, plan) is _Admission.HELD_BACK:
                num_held_back += 1

    def _advance(self, request: RequestState, plan: StepPlan) -> None:
        """Add the next chunk of a prefill that has begun, if there is room for one."""
        start = request.num_computed_tokens
        while True:
            max_tokens = self._kv_cache.max_tokens(request)
            draft = self._chunks.draft(request, plan, start=start, max_tokens=max_tokens)
            if isinstance(draft, ChunkDraft):
                self._add_prefill(request, draft, plan)
                return
            if draft is Shortage.BUDGET or not self._preempt_for(request, draft, plan):
                return

    def _add_prefill(self, request: RequestState, draft: ChunkDraft, plan: StepPlan) -> None:
        """Carry out a draft for a running request."""
        for span in draft.encode:
            plan.add_encoder_input(request, span)
        self._table.hold(request, draft.hold)
        self._counters.num_encoded_rows += draft.num_rows
        new_block_ids = self._kv_cache.allocate(request, draft.end)
        num_tokens = draft.end - draft.start
        plan.add_chunk(request, num_tokens, new_block_ids, draft.cross_items)
        hashes = self._kv_cache.hashes_of_chunk(request, draft.start, draft.end)
        plan.add_prefill(num_tokens, hashes)

    # The line

    def _consider(self, request: RequestState, plan: StepPlan) -> _Admission:
        """Let a request in if there is a slot, memory for all its known tokens, and room for a chunk in this step."""
        if not self._has_slot(request) or not self._adapter_fits(request):
            plan.is_admission_closed = True
            return _Admission.REFUSED
        hit = self._find_prefix(request)
        if self._is_computing(self._kv_cache.next_hashes(request, hit.num_blocks), plan):
            return _Admission.HELD_BACK
        draft = self._draft_first_chunk(request, hit, plan)
        if draft is None:
            plan.is_admission_closed = True  # no other overtakes it and takes what it waits for
            return _Admission.REFUSED
        self._admit(request, hit, draft, plan)
        return _Admission.ADMITTED

    def _has_slot(self, request: RequestState) -> bool:
        """Whether there is a slot, or one that the request's priority gets it."""
        running = self._table.running
        return len(running) < self._max_num_running or may_displace(request, running[-1])

    def _adapter_fits(self, request: RequestState) -> bool:
        """Whether the request's adapter may run beside those of running requests. It waits until enough have ended."""
        own = request.message.adapter_id
        if self._max_loras is None or own == 0:
            return True
        running = {each.message.adapter_id for each in self._table.running} - {0}
        return own in running or len(running) < self._max_loras

    def _find_prefix(self, request: RequestState) -> PrefixHit:
        """The longest prefix that is there and ends where a chunk may begin."""
        hit = self._kv_cache.find_prefix(request)
        while True:
            num_tokens = self._chunks.round_prefix(request, hit.num_tokens, self._kv_cache.block_size)
            if num_tokens == hit.num_tokens:
                return hit
            hit = self._kv_cache.find_prefix(request, num_tokens)

    def _is_computing(self, hashes: Sequence[bytes], plan: StepPlan) -> bool:
        """Whether another request computes something of this, in this step or one in flight.

        After that step it is there for both: `n` outputs of one prompt cost one prefill.
        """
        return any(each in step.computing for each in hashes for step in (plan, *self._in_flight))

    def _draft_first_chunk(self, request: RequestState, hit: PrefixHit, plan: StepPlan) -> ChunkDraft | None:
        """A chunk for a waiting request, with memory made for it where its priority allows; None: it keeps waiting."""
        while True:
            # Anew after each preemption: what the victim held may have left the encoder cache.
            max_tokens = self._kv_cache.max_tokens_behind(hit)
            max_tokens = request.num_tokens if max_tokens is None else min(request.num_tokens, max_tokens)
            draft = self._chunks.draft(request, plan, start=hit.num_tokens, max_tokens=max_tokens)
            shortage = Shortage.BLOCKS if isinstance(draft, ChunkDraft) else draft
            if isinstance(draft, ChunkDraft) and self._has_room(request, hit):
                return draft
            if shortage is Shortage.BUDGET or not self._preempt_for(request, shortage, plan):
                return None

    def _has_room(self, request: RequestState, hit: PrefixHit) -> bool:
        """Whether there is a slot, and memory beside what running requests need."""
        running = self._table.running
        return len(running) < self._max_num_running and self._kv_cache.has_room(request, hit, running)

    def _admit(self, request: RequestState, hit: PrefixHit, draft: ChunkDraft, plan: StepPlan) -> None:
        self._table.start(request, hit)
        if request.scheduled_time_s is None:
            request.scheduled_time_s = time.monotonic()
            request.num_cached_tokens = min(draft.start, request.num_prompt_tokens)
            self._counters.num_prefix_query_tokens += request.num_prompt_tokens
            self._counters.num_prefix_hit_tokens += request.num_cached_tokens
        output_token_ids = tuple(request.token_ids[request.num_prompt_tokens :])
        plan.new_requests.append(NewRequest(request.message, output_token_ids))
        self._add_prefill(request, draft, plan)

    # Steps for one request

    def _plan_alone(self) -> StepPlan | None:
        """A step for a single prefill, if its chunk can't be cut down to fit beside the streams.

        Streams have every other step at least.
        """
        streams = [request for request in self._table.running if request.is_caught_up]
        if streams and self._last_was_alone:
            return None
        num_stream_tokens = sum(each.num_expected_tokens - each.num_computed_tokens for each in streams)
        for request in self._next_prefills():
            start = request.num_computed_tokens
            hit = None
            if request.status is RequestStatus.WAITING:
                hit = self._find_prefix(request)
                start = hit.num_tokens
            if self._fits_beside(num_stream_tokens, request, start):
                if hit is None or self._gets_room(request, hit):
                    return None
                continue  # it waits for memory, which the other one may hold
            token_budget = max(self._max_num_tokens, self._chunks.min_chunk(request, start))
            plan = StepPlan(token_budget, self._max_num_rows, is_alone=True)
            if request.status is RequestStatus.RUNNING:
                self._advance(request, plan)
            else:
                self._consider(request, plan)
            if plan.chunks:
                return plan
        return None

    def _next_prefills(self) -> list[RequestState]:
        """The best prefill that has begun and the head of the line, the better one first."""
        begun = next((request for request in self._table.running if not request.is_caught_up), None)
        waiting = self._table.waiting.peek(0)
        return sorted((request for request in (begun, waiting) if request is not None), key=by_order)

    def _gets_room(self, request: RequestState, hit: PrefixHit) -> bool:
        """Whether there is memory for a waiting request, or its priority gets it some."""
        running = self._table.running
        return self._has_room(request, hit) or may_displace(request, running[-1])

    def _fits_beside(self, num_stream_tokens: int, request: RequestState, start: int) -> bool:
        """Whether the request's chunk fits a step that holds the streams and nothing else."""
        plan = StepPlan(self._max_num_tokens - num_stream_tokens, self._max_num_rows)
        draft = self._chunks.draft(request, plan, start=start, max_tokens=request.num_tokens)
        if draft is Shortage.ENCODER_CACHE:
            return not self._chunks.keeps_prompts_whole
        return isinstance(draft, ChunkDraft)
