"""The scheduler as the engine core sees it: requests in, steps out, results in, outputs out.

Owns the life of every request from `add_request` to its one final output. What a step computes is the step planner's
decision; which blocks and encoder rows are kept, that of the two cache managers. Used by one thread: `schedule`,
submit, and in the same order `update`. Several steps may be in flight between the two.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from sensorium.cache_spec import CacheGroup
from sensorium.config import CacheConfig, ModelFeatures, SchedulerConfig
from sensorium.errors import InvalidRequestError, OverloadedError
from sensorium.messages import EngineOutput, EngineRequest, FinishReason, ModelRunnerOutput, SchedulerOutput
from sensorium.scheduler.admission import check_request
from sensorium.scheduler.chunking import ChunkPlanner
from sensorium.scheduler.drafting import Drafter, Guesses
from sensorium.scheduler.encoder_cache_manager import EncoderCacheManager
from sensorium.scheduler.fair_shares import FairShares
from sensorium.scheduler.kv_cache_manager import KVCacheManager
from sensorium.scheduler.pacing import Pacer
from sensorium.scheduler.request import RequestState
from sensorium.scheduler.request_table import RequestTable
from sensorium.scheduler.stats import Counters, SchedulerStats
from sensorium.scheduler.step_plan import StepPlan
from sensorium.scheduler.step_planner import StepPlanner
from sensorium.scheduler.step_results import StepResults


class Scheduler:
    """Invariant: every request that `add_request` accepted ends in exactly one output with a finish reason.

    Args:
        scheduler_config: Budgets, policy and pace.
        cache_config: Block size and cache settings; its sizes in blocks or bytes are not read.
        features: What the model can do; decides where chunks may end and whether media are encoded apart.
        cache_groups: What the worker keeps of requests, and has room for.
        max_model_len: Most tokens of prompt and output together.
        pacer: Costs of steps; measured from scratch unless given.
        max_loras: Adapters that running requests may have; None: any number.
        make_drafter: Makes what guesses a request's next tokens, or None for a request without guesses. Not asked where
            a layer's cache can't go back.
        counts_tokens: Whether the worker counts tokens for penalties by itself, and needn't be told.
    """

    def __init__(
        self,
        scheduler_config: SchedulerConfig,
        cache_config: CacheConfig,
        features: ModelFeatures,
        *,
        cache_groups: Sequence[CacheGroup],
        max_model_len: int,
        pacer: Pacer | None = None,
        max_loras: int | None = None,
        make_drafter: Callable[[EngineRequest], Drafter | None] | None = None,
        counts_tokens: bool = False,
    ) -> None:
        self._config = scheduler_config
        self._groups = tuple(cache_groups)
        self._max_model_len = max_model_len
        encoder_cache_rows = cache_config.encoder_cache_rows
        if encoder_cache_rows is None:
            encoder_cache_rows = 4 * scheduler_config.max_num_encoder_rows
        self._counters = Counters()
        is_chunked = scheduler_config.enable_chunked_prefill and not features.whole_prompts
        self._kv_cache = KVCacheManager(
            self._groups,
            enable_prefix_caching=cache_config.enable_prefix_caching,
            max_num_seqs=scheduler_config.max_num_seqs,
            max_chunk_tokens=scheduler_config.max_num_batched_tokens if is_chunked else max_model_len,
        )
        self._encoder_cache = EncoderCacheManager(encoder_cache_rows)
        self._shares = FairShares(scheduler_config.policy, max_model_len)
        self._table = RequestTable(self._kv_cache, self._encoder_cache, self._shares, self._counters)
        self._pacer = pacer or Pacer(scheduler_config.max_token_gap_s)
        self._chunks = chunks = ChunkPlanner(
            features,
            self._encoder_cache,
            enable_chunked_prefill=is_chunked,
            snapshot_block_size=self._kv_cache.block_size if self._kv_cache.makes_snapshots else None,
            groups=self._groups,
            has_cross_rows=self._kv_cache.has_cross_rows,
        )
        self._media_token_ids = frozenset[int]().union(*features.placeholder_token_ids.values())
        self._counts_tokens = counts_tokens
        self._make_drafter = make_drafter if all(group.can_go_back for group in self._groups) else None
        self._planner = StepPlanner(
            *(scheduler_config, self._table, self._kv_cache, chunks, self._pacer, self._counters),
            max_loras=max_loras,
            gives_drafts=self._make_drafter is not None,
        )
        self._results = StepResults(self._table, self._kv_cache, self._encoder_cache, self._counters)
        self._in_flight: deque[StepPlan] = deque()

    def add_request(self, request: EngineRequest) -> None:
        """Queue a request.

        Raises:
            InvalidRequestError: It could not run to its end even alone, or its id is in use.
            OverloadedError: The line is full.
        """
        if request.request_id in self._table.by_id:
            raise InvalidRequestError(
                f"got {request.request_id!r}, expected an id that no unfinished request has. Send another request_id.",
                field="request_id",
            )
        check_request(
            request,
            max_model_len=self._max_model_len,
            groups=self._groups,
            least_chunk_tokens=self._chunks.least_chunk_tokens(request),
        )
        limit = self._config.max_waiting_requests
        if limit is not None and not self._shares.has_room(request.tenant, len(self._table.waiting), limit):
            raise OverloadedError(
                f"waiting requests: got {len(self._table.waiting)} already, expected fewer than {limit}. "
                "Try again later, or raise max_waiting_requests."
            )
        drafter = None if self._make_drafter is None or request.pooling else self._make_drafter(request)
        guesses = None if drafter is None else Guesses(drafter, self._media_token_ids)
        order = self._shares.arrive(request)
        state = RequestState(request, order, self._max_model_len, guesses, counts_tokens=self._counts_tokens)
        self._table.add(state)

    def abort(self, request_ids: Iterable[str]) -> list[EngineOutput]:
        """End requests, also between `schedule` and `update`; ids that are unknown or finished are ignored."""
        outputs = []
        for request_id in request_ids:
            request = self._table.by_id.get(request_id)
            if request is not None:
                self._table.finish(request)
                outputs.append(
                    EngineOutput(
                        request_id,
                        finish_reason=FinishReason.ABORT,
                        num_cached_tokens=request.num_cached_tokens,
                        scheduled_time_s=request.scheduled_time_s,
                    )
                )
        return outputs

    def schedule(self) -> SchedulerOutput | None:
        """The next step; None if every request waits for what the steps in flight bring.

        It is without chunks only if no request is unfinished. Every step goes to the worker, one without chunks too:
        it may tell what to free.
        """
        plan = self._planner.plan(self._in_flight)
        if not plan.chunks and self._in_flight:
            return None
        plan.submit()
        self._kv_cache.submitted(plan.chunks)
        self._in_flight.append(plan)
        self._counters.num_steps += 1
        return plan.to_output(
            self._counters.num_steps, self._encoder_cache.take_freed_keys(), self._table.take_freed_ids()
        )

    def update(self, step: SchedulerOutput, result: ModelRunnerOutput) -> list[EngineOutput]:
        """Take in what the oldest step in flight brought; returns the outputs of its requests.

        A worker that lost a whole step reports a failure for each of its requests.
        """
        oldest = self._counters.num_steps - len(self._in_flight) + 1
        assert step.step == oldest, f"got the result of step {step.step}, expected that of step {oldest}"
        plan = self._in_flight.popleft()
        self._counters.encode_s += result.encode_s
        self._counters.forward_s += result.forward_s
        self._counters.idle_s += result.idle_s
        if plan.chunks and not result.failures:
            self._pacer.observe(
                plan.num_prefill_tokens, plan.num_rows, result.encode_s, result.forward_s, plan.num_draft_tokens
            )
        return self._results.apply(plan, result)

    def has_unfinished_requests(self) -> bool:
        """Whether a step would have something to compute."""
        return bool(self._table.by_id)

    @property
    def has_releases(self) -> bool:
        """Whether the worker still keeps something of ended requests; one more step, if an empty one, frees it."""
        return self._table.has_freed_ids or self._encoder_cache.has_freed_keys

    @property
    def num_unfinished(self) -> int:
        """Requests that have not had their final output."""
        return len(self._table.by_id)

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes. Running requests go on, and what they compute is not shared."""
        self._kv_cache.reset_prefix_cache(self._table.running)

    def stats(self) -> SchedulerStats:
        """Gauges and counters."""
        counters, pools = self._counters, self._kv_cache.pools
        return SchedulerStats(
            num_running=len(self._table.running),
            num_waiting=len(self._table.waiting),
            num_blocks=sum(pool.num_blocks for pool in pools),
            num_free_blocks=sum(pool.num_free for pool in pools),
            num_cached_blocks=sum(pool.num_cached for pool in pools),
            kv_cache_usage=self._kv_cache.usage,
            num_encoder_cache_rows=self._encoder_cache.num_rows,
            num_steps=counters.num_steps,
            num_preemptions=counters.num_preemptions,
            num_block_evictions=sum(pool.num_evictions for pool in pools),
            num_prefix_query_tokens=counters.num_prefix_query_tokens,
            num_prefix_hit_tokens=counters.num_prefix_hit_tokens,
            num_encoder_queries=counters.num_encoder_queries,
            num_encoder_hits=counters.num_encoder_hits,
            num_encoded_rows=counters.num_encoded_rows,
            num_draft_tokens=counters.num_draft_tokens,
            num_accepted_tokens=counters.num_accepted_tokens,
            encode_s=counters.encode_s,
            forward_s=counters.forward_s,
            idle_s=counters.idle_s,
        )

    def check(self) -> None:
        """Raise `AssertionError` unless all books agree. For tests; costs time with the number of blocks."""
        self._kv_cache.check(self._table.running)
        self._encoder_cache.check()
        self._table.check()

    def check_idle(self) -> None:
        """Raise `AssertionError` unless nothing is held for anyone."""
        self.check()
        assert not self._table.by_id, f"unfinished: {list(self._table.by_id)}"
        self._kv_cache.check_idle()
        self._shares.check_idle()
        assert self._encoder_cache.num_held_rows == 0, "encoder entries leaked"
