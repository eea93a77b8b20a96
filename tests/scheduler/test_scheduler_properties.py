"""Whatever arrives, is aborted, fails or is preempted: every request gets the tokens that it gets alone, once."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sensorium.cache_spec import CacheGroup, CacheKind
from sensorium.config import CacheConfig, ModelFeatures, SchedulerConfig
from sensorium.errors import InvalidRequestError
from sensorium.inputs.admission import check_two_way
from sensorium.messages import EngineRequest
from sensorium.scheduler.pacing import Pacer
from sensorium.spans import Span
from tests.scheduler.simulation import Limits, Simulation, make_request

MASKS: dict[str, tuple[bool, ...]] = {
    "tiny": (True,),
    "three": (True,) * 3,
    "two": (True,) * 2,
    "rows": (False, *(True,) * 5, False, *(True,) * 5, False),
    "tail": (*(True,) * 4, False, False),
    "large": (True,) * 23,
    "huge": (True,) * 40,
    "empty": (False, False),
}
BAD = (True,) * 6
"""An item that can't be encoded."""
Rule = tuple[CacheKind, int | None]
FULL: Rule = (CacheKind.FULL, None)
STATE: Rule = (CacheKind.STATE, None)
MIXED: tuple[tuple[Rule, ...], ...] = (
    (FULL, (CacheKind.WINDOW, 5)),
    (FULL, (CacheKind.WINDOW, 1), (CacheKind.WINDOW, 40)),
    ((CacheKind.WINDOW, 7),),
    (FULL, (CacheKind.CHUNK, 12)),
    (FULL, STATE),
    (STATE,),
    (FULL, (CacheKind.WINDOW, 16), (CacheKind.CHUNK, 3), STATE),
)
"""Cache groups that models of other kinds have."""
MOST_CROSS_ROWS = 23
"""Of an item, of which a prompt has at most three."""
PREFIXES: tuple[list[int], ...] = ([], [1, 2, 3], list(range(10, 27)), [9] * 40)


@dataclass(frozen=True)
class Scenario:
    seed: int
    num_requests: int
    block_size: int
    num_blocks: int
    max_num_batched_tokens: int
    max_num_seqs: int
    max_num_encoder_rows: int
    encoder_cache_rows: int
    enable_chunked_prefill: bool
    enable_prefix_caching: bool
    policy: str
    splits_media: bool
    atomic_items: bool
    two_way: frozenset[str]
    failure_rate: float
    abort_rate: float
    max_drafts: int
    max_steps_in_flight: int
    token_s: float | None
    rules: tuple[Rule, ...]
    is_tight: bool
    """Windows get hardly more blocks than one request needs, and states no row for snapshots."""

    def group(self, kind: CacheKind, reach: int | None) -> CacheGroup:
        if kind is CacheKind.CROSS:
            least = -(-3 * MOST_CROSS_ROWS // self.block_size)
            return CacheGroup(kind, least * (1 + self.seed % 3), self.block_size, max_rows=3 * MOST_CROSS_ROWS)
        if kind is CacheKind.STATE:
            return CacheGroup(kind, (2 if self.is_tight else 3) * self.max_num_seqs, self.block_size)
        if reach is None or not self.is_tight or not self.enable_chunked_prefill:
            return CacheGroup(kind, self.num_blocks, self.block_size, reach)
        keeps_items_whole = self.atomic_items or not self.splits_media
        largest = max(40 if keeps_items_whole else 1, self.max_num_batched_tokens if self.two_way else 1)
        least = CacheGroup(kind, 0, self.block_size, reach).blocks_within_reach(largest)
        return CacheGroup(kind, least + self.seed % 3, self.block_size, reach)

    @property
    def limits(self) -> Limits:
        scheduler = SchedulerConfig(
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_seqs=self.max_num_seqs,
            max_num_encoder_rows=self.max_num_encoder_rows,
            enable_chunked_prefill=self.enable_chunked_prefill,
            policy=self.policy,
            max_steps_in_flight=self.max_steps_in_flight,
        )
        cache = CacheConfig(
            block_size=self.block_size,
            enable_prefix_caching=self.enable_prefix_caching,
            encoder_cache_rows=self.encoder_cache_rows,
        )
        features = ModelFeatures(splits_media=self.splits_media, atomic_items=self.atomic_items, two_way=self.two_way)
        groups = tuple(self.group(*rule) for rule in self.rules)
        return Limits(scheduler, cache, features, self.num_blocks, self.num_blocks * self.block_size, groups)

    @property
    def pacer(self) -> Pacer | None:
        if self.token_s is None:
            return None
        return Pacer(0.25, decode_s=0.1, token_s=self.token_s, row_s=self.token_s)


scenarios = st.builds(
    Scenario,
    seed=st.integers(0, 2**32),
    num_requests=st.integers(1, 24),
    block_size=st.sampled_from([1, 4, 16]),
    num_blocks=st.integers(10, 60),
    max_num_batched_tokens=st.sampled_from([16, 33, 64, 512]),
    max_num_seqs=st.integers(1, 12),
    max_num_encoder_rows=st.sampled_from([3, 12, 30, 500]),
    encoder_cache_rows=st.sampled_from([0, 12, 30, 1000]),
    enable_chunked_prefill=st.booleans(),
    enable_prefix_caching=st.booleans(),
    policy=st.sampled_from(["fcfs", "priority"]),
    splits_media=st.booleans(),
    atomic_items=st.booleans(),
    two_way=st.sampled_from([frozenset(), frozenset({"image"}), frozenset({"prompt"})]),
    failure_rate=st.sampled_from([0.0, 0.0, 0.01, 0.1]),
    abort_rate=st.sampled_from([0.0, 0.0, 0.05, 0.3]),
    max_drafts=st.sampled_from([0, 0, 1, 5]),
    max_steps_in_flight=st.sampled_from([1, 2, 3]),
    token_s=st.sampled_from([None, 1e-4, 1e-2]),
    rules=st.just((FULL,)),
    is_tight=st.booleans(),
)


def random_request(rng: Random, request_id: str, limits: Limits, kinds: Sequence[str]) -> EngineRequest | None:
    """A request that shares prefixes and media with others; None if it came out too long."""
    parts: list[Sequence[Any]] = [rng.choice(PREFIXES if len(kinds) > 3 else PREFIXES[:2])]
    for _ in range(rng.randint(0, 3)):
        kind = rng.choice(kinds) if rng.random() < 0.97 else "bad"
        parts.append((f"{kind}-{rng.randint(0, 1)}", MASKS.get(kind, BAD)))
        parts.append([rng.randint(0, 3) for _ in range(rng.choice([0, 0, 1, 5]))])
    parts.append([rng.randint(0, 49) for _ in range(rng.randint(0, 12))])
    length = sum(len(part if isinstance(part, list) else part[1]) for part in parts)
    max_tokens = rng.choice([1, 2, 8, 30])
    if length == 0 or length + max_tokens > limits.max_model_len:
        return None
    request = make_request(
        request_id,
        parts,
        two_way=limits.features.two_way,
        max_tokens=max_tokens,
        min_tokens=rng.choice([0, 0, max_tokens // 2]),
        ignore_eos=rng.random() < 0.5,
        stop_token_ids=[3, 4] if rng.random() < 0.2 else [],
        prompt_logprobs=0 if rng.random() < 0.15 else None,
        priority=rng.randint(0, 2),
        tenant=rng.choice(["", "", "a", "b"]),
        pooling=rng.random() < 0.1,
        repetition_penalty=1.1 if rng.random() < 0.1 else 1.0,
    )
    if any(group.kind is CacheKind.CROSS for group in limits.cache_groups):
        request = attended(request, many=limits.num_blocks % 2 == 0, cuts=limits.scheduler.enable_chunked_prefill)
    try:
        check_two_way(request.two_way_spans, [item.span for item in request.media], limits.scheduler)
    except InvalidRequestError:
        return None
    return request


def attended(request: EngineRequest, *, many: bool, cuts: bool) -> EngineRequest:
    """The same request with its media for cross-attention: `many` of which all rows are seen from their place on, or
    the first, of which fewer are seen behind its place. Prompts that aren't cut have it at their beginning."""
    media = []
    for item in request.media if many and cuts else request.media[:1]:
        rows = 1 + zlib.crc32(item.key.encode()) % MOST_CROSS_ROWS
        seen = rows if many or not cuts else 1 + rows // 2
        span = Span(item.span.offset, item.span.length) if cuts else Span(0, 1)
        media.append(replace(item, span=span, cross_rows=rows, seen_rows=seen))
    return replace(request, media=tuple(media), two_way_spans=())


def play(scenario: Scenario) -> Simulation:
    """One run: arrivals in bursts, aborts before and during steps, resets of the cache now and then."""
    rng = Random(scenario.seed)
    simulation = Simulation(
        scenario.limits,
        seed=scenario.seed,
        max_drafts=scenario.max_drafts,
        failure_rate=scenario.failure_rate,
        pacer=scenario.pacer,
    )
    kinds = rng.sample(list(MASKS), rng.randint(1, len(MASKS)))
    arrivals = [random_request(rng, f"r{i}", scenario.limits, kinds) for i in range(scenario.num_requests)]
    pending = [request for request in arrivals if request is not None]
    num_tokens = sum(len(r.prompt_token_ids) + (r.sampling_params.max_tokens or 0) for r in pending)
    while pending or simulation.scheduler.has_unfinished_requests():
        for _ in range(rng.choice([0, 0, 1, 3])):
            if pending:
                assert simulation.add(pending.pop(0))
        if rng.random() < scenario.abort_rate and simulation.requests:
            simulation.abort([rng.choice(list(simulation.requests)), "unknown"])
        in_flight = []
        if rng.random() < scenario.abort_rate and simulation.requests:
            in_flight = [rng.choice(list(simulation.requests))]
        simulation.step(in_flight)
        if rng.random() < 0.02:
            simulation.scheduler.reset_prefix_cache()
        assert len(simulation.steps) < 200 + 20 * num_tokens, "no progress"
    simulation.finish()
    return simulation


@settings(max_examples=150, suppress_health_check=list(HealthCheck), derandomize=True)
@given(scenario=scenarios)
def test_every_request_gets_what_it_gets_alone(scenario: Scenario) -> None:
    play(scenario)


@settings(max_examples=150, suppress_health_check=list(HealthCheck), derandomize=True)
@given(scenario=scenarios, rules=st.sampled_from(MIXED))
def test_whatever_the_layers_keep(scenario: Scenario, rules: tuple[Rule, ...]) -> None:
    """Windows whose blocks go back while their requests run, and states of which some are snapshots."""
    play(replace(scenario, rules=rules))


@settings(max_examples=80, suppress_health_check=list(HealthCheck), derandomize=True)
@given(scenario=scenarios)
def test_rows_of_encoders_that_tokens_attend_to(scenario: Scenario) -> None:
    """Whoever shares them, and whoever goes: a request sees the rows of its own items, from their place on."""
    rules: tuple[Rule, ...] = (FULL, (CacheKind.CROSS, None))
    play(replace(scenario, rules=rules, splits_media=True, atomic_items=False, two_way=frozenset()))
