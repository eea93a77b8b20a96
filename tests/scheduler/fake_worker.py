"""A worker without a model that knows exactly what every KV slot must hold.

The "KV" at position `p` is a hash over all inputs up to `p`, so that a slot tells which prefix it was computed from.
The worker computes it from what it reads in the cache, as attention does, and compares it with what the request gives
alone. Whatever goes wrong with shared blocks, preemption, poisoned blocks or media rows shows up as a wrong hash.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from sensorium.cache_spec import NO_BLOCK, CacheGroup, CacheKind, SpanRule
from sensorium.messages import (
    EngineRequest,
    MediaItem,
    ModelRunnerOutput,
    RequestFailure,
    ScheduledChunk,
    SchedulerOutput,
    TokenLogprobs,
)

VOCAB_SIZE = 50
EOS = 7
ROOT = 12345
POISON = -1

Value = tuple[int, int, int]
"""What enters the model at a position: `(0, token id, 0)`, or `(1, hash of the item's key, row)`."""


def step_hash(parent: int, value: Value) -> int:
    return hash((parent, *value))


def next_token(state: int) -> int:
    """The token that the "model" samples after this state."""
    return (state >> 7) % VOCAB_SIZE


def media_value(item: MediaItem, row: int) -> Value:
    return (1, zlib.crc32(item.key.encode()), row)


def encode(item: MediaItem) -> list[Value]:
    """The item's rows."""
    return [media_value(item, row) for row in range(item.num_rows)]


def rows_seen(request: EngineRequest, end: int) -> list[Value]:
    """The rows that a chunk which ends at `end` sees by cross-attention."""
    seen: list[Value] = []
    for item in request.media:
        if item.span.offset < end:
            seen += encode(item)[: item.cross_rows if end < item.span.end else item.seen_rows]
    return seen


def media_rows(item: MediaItem) -> dict[int, int]:
    """Position in the prompt -> row."""
    offsets = range(item.span.length) if item.span.row_offsets is None else item.span.row_offsets.tolist()
    return {item.span.offset + i: row for row, i in enumerate(offsets)}


class TrueSequence:
    """The true inputs and states of one request, extended as tokens come."""

    def __init__(self, request: EngineRequest) -> None:
        self.request = request
        self.token_ids = list(request.prompt_token_ids)
        placed = [item for item in request.media if not item.cross_rows]
        self.row_at = {p: (item, row) for item in placed for p, row in media_rows(item).items()}
        self.attends = len(placed) < len(request.media)
        self.states: list[int] = []
        self.spans = {p: span for span in request.two_way_spans for p in range(*span)}

    def value(self, position: int) -> Value:
        if position in self.row_at:
            item, row = self.row_at[position]
            return media_value(item, row)
        seen = rows_seen(self.request, position + 1) if self.attends else []
        return (0, self.token_ids[position], hash(tuple(seen)) if seen else 0)

    def state(self, position: int) -> int:
        """The state after `position`; `ROOT` before the first."""
        while len(self.states) <= position:
            parent = self.states[-1] if self.states else ROOT
            at = len(self.states)
            self.states.append(self.next_state(parent, at, self.value(at)))
        return self.states[position] if position >= 0 else ROOT

    def next_state(self, parent: int, position: int, value: Value) -> int:
        """The state after `position`; within a two-way span it depends on all of the span."""
        if position in self.spans:
            begin, end = self.spans[position]
            parent = hash((parent, position - begin, *map(self.value, range(begin, end))))
        return step_hash(parent, value)


def expected_output(request: EngineRequest, max_model_len: int) -> list[int]:
    """The tokens that the request gets when it runs alone, after the rules of `SamplingParams`."""
    params, sequence, output = request.sampling_params, TrueSequence(request), list[int]()
    while True:
        token = next_token(sequence.state(len(sequence.token_ids) - 1))
        sequence.token_ids.append(token)
        output.append(token)
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else request.eos_token_ids)}
        if token in ends and len(output) >= params.min_tokens:
            return output
        if len(output) == params.max_tokens or len(sequence.token_ids) == max_model_len:
            return output


def expected_prompt_logprobs(request: EngineRequest) -> list[TokenLogprobs]:
    sequence = TrueSequence(request)
    return [
        TokenLogprobs(sequence.token_ids[p + 1], float(sequence.state(p)), 1)
        for p in range(len(request.prompt_token_ids) - 1)
    ]


@dataclass
class Slot:
    sequence: TrueSequence
    tables: list[list[int]] = field(default_factory=list)
    """Block ids by cache group; of a state, the row that the last chunk wrote."""
    source: int = NO_BLOCK
    """The row that the next chunk reads its state from."""
    computed: int | None = None
    has_sampled: bool = False
    has_failed: bool = False
    """A chunk failed. Steps that were in flight then may still bring chunks of the request."""


class FakeWorker:
    def __init__(
        self,
        groups: Sequence[CacheGroup],
        *,
        max_num_seqs: int,
        splits_media: bool = True,
        keeps_items_whole: bool = False,
        max_drafts: int = 0,
        failure_rate: float = 0.0,
        rng: Random | None = None,
    ) -> None:
        self.groups = tuple(groups)
        self.block_size = groups[0].block_size
        self.max_num_seqs = max_num_seqs
        self.splits_media = splits_media
        self.keeps_items_whole = keeps_items_whole or not splits_media
        self.max_drafts = max_drafts
        self.failure_rate = failure_rate
        self.rng = rng or Random(0)
        self.kv = [[[POISON] * group.block_size for _ in range(group.num_blocks)] for group in groups]
        """By group and block; of a state, each row's first entry is it."""
        self.rows: dict[str, list[Value]] = {}
        self.bad_keys: set[str] = set()
        """Items that could not be encoded, until the scheduler has heard of it and frees them."""
        self.slots: dict[str, Slot] = {}
        self.injected: set[str] = set()
        """Requests that were failed at random."""
        self.seconds: Callable[[SchedulerOutput], tuple[float, float]] = lambda step: (1e-3, 1e-3)
        """What a step costs: seconds of encoding, and of the forward pass."""

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        self._take_in(step)
        bad_keys = self._encode(step)
        encode_s, forward_s = self.seconds(step)
        result = ModelRunnerOutput({}, {}, {}, {}, {}, encode_s, forward_s)
        chunks = []
        for chunk in step.chunks:
            if self.slots[chunk.request_id].has_failed:
                result.failures[chunk.request_id] = RequestFailure("it failed before")  # type: ignore[index]
            else:
                chunks.append(chunk)
        for chunk in chunks:
            self._check_chunk(chunk)
        self._check_order_and_writes(chunks)
        for chunk in chunks:
            self._run(chunk, bad_keys, result)
        return result

    def _take_in(self, step: SchedulerOutput) -> None:
        for request_id in step.freed_request_ids:
            self.slots.pop(request_id, None)
        for new in step.new_requests:
            sequence = TrueSequence(new.request)
            sequence.token_ids += new.output_token_ids
            assert new.request.request_id not in self.slots
            self.slots[new.request.request_id] = Slot(sequence, [[] for _ in self.groups])
        assert len(self.slots) <= self.max_num_seqs
        for key in step.free_encoder_keys:
            self.rows.pop(key, None)
            self.bad_keys.discard(key)
        assert {n.request.request_id for n in step.new_requests} <= {c.request_id for c in step.chunks}
        assert step.num_scheduled_tokens == sum(c.num_scheduled_tokens for c in step.chunks)

    def _encode(self, step: SchedulerOutput) -> set[str]:
        bad = set()
        in_step = {chunk.request_id for chunk in step.chunks}
        for each in step.encoder_inputs:
            assert self.splits_media
            assert each.request_id in in_step
            item = self.slots[each.request_id].sequence.request.media[each.item]
            assert item.key not in self.rows, "encoded twice"
            assert item.key not in bad, "encoded twice in one step"
            if item.key.startswith("bad"):
                bad.add(item.key)
            else:
                self.rows[item.key] = encode(item)
        return bad

    def _check_chunk(self, chunk: ScheduledChunk) -> None:
        """What the chunk reads was written by earlier steps, and is this request's own history."""
        slot = self.slots[chunk.request_id]
        begin, end = chunk.num_computed_tokens, chunk.num_computed_tokens + chunk.num_scheduled_tokens
        if slot.computed is None:
            assert begin % self.block_size == 0, "a cached prefix is whole blocks"
        else:
            assert begin == slot.computed, "tokens are computed once, in order"
        self._take_blocks(slot, chunk)
        known, num_drafts = len(slot.sequence.token_ids), len(chunk.draft_token_ids)
        assert begin < end - num_drafts <= known
        assert chunk.is_last == (end - num_drafts == known)
        assert num_drafts <= (self.max_drafts if slot.has_sampled else 0)
        for index, group in enumerate(self.groups):
            self._check_history(chunk, slot, index, group)
        for first, last in slot.sequence.request.two_way_spans:
            if first < begin < last:
                assert slot.computed is None, "a chunk begins inside a two-way span, and isn't the first"
            assert not first < end < last, "a chunk ends inside a two-way span"
        if self.keeps_items_whole:
            for item in slot.sequence.request.media:
                assert not item.span.offset < begin < item.span.end, "a chunk begins inside an item"
                assert not item.span.offset < end < item.span.end, "a chunk ends inside an item"

    def _take_blocks(self, slot: Slot, chunk: ScheduledChunk) -> None:
        for index, ids in enumerate(chunk.new_block_ids):
            if self.groups[index].is_paged:
                slot.tables[index] += ids
            else:
                slot.source, target = ids
                slot.tables[index] = [target]

    def _check_history(self, chunk: ScheduledChunk, slot: Slot, index: int, group: CacheGroup) -> None:
        """What the chunk's first token sees in a group is this request's own history."""
        begin, end = chunk.num_computed_tokens, chunk.num_computed_tokens + chunk.num_scheduled_tokens
        table = slot.tables[index]
        if group.kind is CacheKind.CROSS:
            self._check_sight(chunk, slot, table)
            return
        if not group.is_paged:
            state = ROOT if slot.source == NO_BLOCK else self.kv[index][slot.source][0]
            assert state == slot.sequence.state(begin - 1), f"wrong state before {begin} of {chunk.request_id}"
            assert slot.source not in table, "a state is written where it is read, and couldn't be computed again"
            return
        room = len(table) * self.block_size
        # Drafts that were wrong leave blocks behind that the next tokens need.
        assert end <= room < end + self.block_size + self.max_drafts, "blocks are allocated as needed"
        low = group.first_visible(begin)
        if group.spans is SpanRule.SEEN and begin in slot.sequence.spans:
            low = min(low, slot.sequence.spans[begin][0])
        visible = table[low // self.block_size :]
        assert NO_BLOCK not in visible
        assert len(set(visible)) == len(visible)
        for position in range(low, begin):
            found = self._read(slot, index, position)
            assert found == slot.sequence.state(position), f"wrong KV at {position} of {chunk.request_id}: {group.kind}"

    def _check_sight(self, chunk: ScheduledChunk, slot: Slot, table: list[int]) -> None:
        """All tokens of a chunk see the same rows, which have room, and are written where an item is first seen."""
        begin, end = chunk.num_computed_tokens, chunk.num_computed_tokens + chunk.num_scheduled_tokens
        media = slot.sequence.request.media
        for item in media:
            for cut in (item.span.offset, item.span.end - 1):
                assert not begin < cut < end, "tokens of one chunk see different rows"
        assert len(table) == -(-sum(item.cross_rows for item in media) // self.block_size)
        assert all(begin <= media[i].span.offset < end for i in chunk.cross_items)

    def _attend(self, chunk: ScheduledChunk, slot: Slot) -> None:
        """Write the rows that the chunk is to write, and look at all that it sees."""
        request = slot.sequence.request
        end = chunk.num_computed_tokens + chunk.num_scheduled_tokens
        for index, group in enumerate(self.groups):
            if group.kind is not CacheKind.CROSS:
                continue
            places = [(block, offset) for block in slot.tables[index] for offset in range(self.block_size)]
            first = 0
            for i, item in enumerate(request.media):
                if i in chunk.cross_items:
                    assert item.key in self.rows, f"rows of {item.key} are missing"
                    for (block, offset), value in zip(places[first:], self.rows[item.key], strict=False):
                        self.kv[index][block][offset] = hash(value)
                first += item.cross_rows
            seen = rows_seen(request, end)
            found = [self.kv[index][block][offset] for block, offset in places[: len(seen)]]
            assert found == [hash(value) for value in seen], f"wrong rows for {chunk.request_id}"

    def _used(self, slot: Slot, index: int, chunks: Mapping[int, ScheduledChunk]) -> set[int]:
        """Blocks of a group that a request reads in this step, or may read in a later one."""
        group, chunk = self.groups[index], chunks.get(id(slot))
        if group.kind is CacheKind.CROSS:
            return set(slot.tables[index])
        if not group.is_paged:
            return {slot.source, *slot.tables[index]} if chunk is not None else set(slot.tables[index])
        computed = slot.computed or 0 if chunk is None else chunk.num_computed_tokens
        return set(slot.tables[index][group.first_visible(computed) // self.block_size :])

    def _check_order_and_writes(self, chunks: Iterable[ScheduledChunk]) -> None:
        seen_prefill = False
        by_slot = {id(self.slots[chunk.request_id]): chunk for chunk in chunks}
        for chunk in chunks:
            slot = self.slots[chunk.request_id]
            assert not (slot.has_sampled and seen_prefill), "decode chunks come first"
            seen_prefill |= not slot.has_sampled
            first = chunk.num_computed_tokens // self.block_size
            end = chunk.num_computed_tokens + chunk.num_scheduled_tokens
            for index, group in enumerate(self.groups):
                table = slot.tables[index]
                written = table[first : -(-end // self.block_size)] if group.is_paged else table
                if group.kind is CacheKind.CROSS:
                    written = table if chunk.cross_items else []
                for other_id, other in self.slots.items():
                    if other_id != chunk.request_id and not other.has_failed:
                        assert not set(written) & self._used(other, index, by_slot), "a block that is written is shared"

    def _read(self, slot: Slot, index: int, position: int) -> int:
        block, offset = divmod(position, self.block_size)
        return self.kv[index][slot.tables[index][block]][offset]

    def _input(self, slot: Slot, position: int) -> Value:
        """The input as the worker has it: media rows only from what was encoded and not freed."""
        if position in slot.sequence.row_at and self.splits_media:
            item, row = slot.sequence.row_at[position]
            assert item.key in self.rows, f"rows of {item.key} are missing at position {position}"
            return self.rows[item.key][row]
        return slot.sequence.value(position)

    def _run(self, chunk: ScheduledChunk, bad_keys: set[str], result: ModelRunnerOutput) -> None:
        slot = self.slots[chunk.request_id]
        request = slot.sequence.request
        begin, end = chunk.num_computed_tokens, chunk.num_computed_tokens + chunk.num_scheduled_tokens
        self.bad_keys |= bad_keys
        is_bad = any(item.key in self.bad_keys for item in request.media)
        if not self.splits_media:  # the forward pass itself encodes
            is_bad = any(i.key.startswith("bad") and i.span.offset < end and begin < i.span.end for i in request.media)
        is_injected = self.rng.random() < self.failure_rate
        if is_bad or is_injected:
            if is_injected:
                self.injected.add(chunk.request_id)
            for position in range(begin, end):
                self._write(slot, position, POISON)
            slot.has_failed = True
            result.failures[chunk.request_id] = RequestFailure("injected")  # type: ignore[index]
            return
        self._attend(chunk, slot)
        state = slot.sequence.state(begin - 1)  # as `_check_history` has found it
        first_draft = end - len(chunk.draft_token_ids)
        for position in range(begin, first_draft):
            state = slot.sequence.next_state(state, position, self._input(slot, position))
            assert state == slot.sequence.state(position)
            self._write(slot, position, state)
        states = [state]
        for position, token_id in enumerate(chunk.draft_token_ids, first_draft):
            seen = slot.sequence.value(begin)[2]  # no two-way span has tokens of the output, and all items are seen
            states.append(step_hash(states[-1], (0, token_id, seen)))
            self._write(slot, position, states[-1])
        slot.computed = first_draft
        self._report(chunk, slot, states, result)

    def _write(self, slot: Slot, position: int, state: int) -> None:
        block, offset = divmod(position, self.block_size)
        for index, group in enumerate(self.groups):
            if group.keeps_positions:
                self.kv[index][slot.tables[index][block]][offset] = state
            elif group.kind is CacheKind.STATE:
                self.kv[index][slot.tables[index][0]][0] = state

    def _report(self, chunk: ScheduledChunk, slot: Slot, states: Sequence[int], result: ModelRunnerOutput) -> None:
        """`states`: behind the chunk's known tokens, and behind each of its drafts."""
        request = slot.sequence.request
        begin, end = chunk.num_computed_tokens, chunk.num_computed_tokens + chunk.num_scheduled_tokens
        if request.sampling_params.prompt_logprobs is not None:
            entries = expected_prompt_logprobs(request)[begin:end]
            if entries:
                result.prompt_logprobs[chunk.request_id] = entries  # type: ignore[index]
        if not chunk.is_last:
            return
        if request.pooling:
            result.pooled[chunk.request_id] = states[0]  # type: ignore[index]
            return
        tokens = []
        for state, draft in zip(states, [*chunk.draft_token_ids, None], strict=True):
            tokens.append(next_token(state))
            if tokens[-1] != draft:
                break
        slot.sequence.token_ids += tokens
        assert slot.computed is not None
        slot.computed += len(tokens) - 1
        slot.has_sampled = True
        result.sampled_token_ids[chunk.request_id] = tokens  # type: ignore[index]
