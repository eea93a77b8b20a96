"""Fixed slots for running requests, and the arrays of one step gathered from them.

Owns token ids, block tables and positions of the requests that hold a slot. A request keeps its slot from the step
that brings it until it finishes or is preempted; a step gathers rows by slot index, so nothing moves when requests
come and go. Called by the model runner only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sensorium.attention import compute_row_spans
from sensorium.cache_spec import NO_BLOCK, CacheGroup, CacheKind, SpanRule
from sensorium.messages import EngineRequest, MediaItem, NewRequest, RequestFailure, ScheduledChunk
from sensorium.worker.block_tables import DeviceBlockTables
from sensorium.worker.kv_cache import zero_row

Int64Array = npt.NDArray[np.int64]


@dataclass(slots=True, eq=False)
class SlotState:
    """What the runner remembers of one request beside its rows in the arrays."""

    request: EngineRequest
    slot: int
    failure: RequestFailure | None = None
    """Why the request can't go on. Steps that were planned before that was known may still hold chunks of it."""
    media_end: int = 0
    """First position behind the last media span and the last two-way span."""
    num_blocks: list[int] = field(default_factory=list)
    """Length of its block table in each group."""

    @classmethod
    def create(cls, request: EngineRequest, slot: int) -> SlotState:
        """State of a request that was just given `slot`."""
        return cls(
            request,
            slot,
            media_end=max((*(item.span.end for item in request.media), *(end for _, end in request.two_way_spans), 0)),
        )


@dataclass(frozen=True, slots=True, eq=False)
class StepArrays:
    """One step's flat batch on the host: rows of chunk `i` are
    `[cu_seqlens_q[i], cu_seqlens_q[i + 1])`."""

    token_ids: Int64Array
    """`(num_tokens,)`; any id where `pending_slots` says so."""
    positions: Int64Array
    """`(num_tokens,)` index of each row in its sequence, or `(3, num_tokens)` with M-RoPE."""
    slot_mapping: Int64Array
    """`(num_tables, num_tokens)` index of each row's place in the KV cache of each group with blocks."""
    query_lens: npt.NDArray[np.int32]
    seq_lens: npt.NDArray[np.int32]
    max_blocks: int
    """Blocks of the longest sequence."""
    cu_seqlens_q: npt.NDArray[np.int32]
    """`(num_chunks + 1,)`"""
    slots: Int64Array
    """`(num_chunks,)`"""
    state_rows: Int64Array | None
    """`(2, num_chunks)`: the rows from which the chunks read their states, and into which they write them; None where
    no layer has a state."""
    pending_slots: Int64Array | None
    """`(num_tokens,)`: the slot whose token a step in flight samples for this row, -1 for known tokens; None where all
    are known."""
    adapter_ids: Int64Array | None = None
    """`(num_tokens,)`: each row's adapter, 0 for the base model; None where all rows are the base model's."""
    row_spans: npt.NDArray[np.int32] | None = None
    """`(num_tables, 2, num_tokens)`: the span that each row sees both ways in each group with blocks, see
    `AttentionMetadata.row_spans`; None where no row is in one."""
    cross_lens: npt.NDArray[np.int32] | None = None
    """`(num_chunks,)`: rows of media items that each chunk's tokens see by cross-attention; None where no layer does
    that."""
    cross_slots: Int64Array | None = None
    """`(num_rows,)`: places in the cache of cross-attention of the rows that the chunks write."""
    cross_before: npt.NDArray[np.int32] | None = None
    """`(num_chunks,)`: 1 for chunks before the last token of an item's span, which see all of its rows."""

    @property
    def adapters(self) -> tuple[int, ...]:
        """The adapters that some row has."""
        return () if self.adapter_ids is None else tuple(np.unique(self.adapter_ids[self.adapter_ids != 0]).tolist())


def num_tables(groups: Sequence[CacheGroup]) -> int:
    """Block tables of a request; where no group has blocks, one that is not used."""
    return max(sum(group.is_paged for group in groups), 1)


def max_blocks_of(groups: Sequence[CacheGroup], max_model_len: int) -> int:
    """Most blocks that one request has in any of these groups."""
    return max(-(-max_model_len // groups[0].block_size), *(group.blocks_of_rows for group in groups))


class InputBatch:
    """Invariant: `_states` and `_free_slots` partition the slots; rows of a free slot mean nothing."""

    def __init__(
        self,
        max_num_seqs: int,
        max_model_len: int,
        groups: Sequence[CacheGroup],
        *,
        uses_mrope: bool,
        device_tables: DeviceBlockTables | None = None,
    ) -> None:
        """`device_tables`, where there are any, learn of the same blocks."""
        self._device_tables = device_tables
        self.groups = tuple(groups)
        self.block_size = groups[0].block_size
        self.uses_mrope = uses_mrope
        max_blocks = max_blocks_of(groups, max_model_len)
        kinds = [group.kind for group in groups]
        self._cross_index = kinds.index(CacheKind.CROSS) if CacheKind.CROSS in kinds else None
        """The group of cross-attention, if there is one, and its table."""
        # Zero pages are not touched until a request is long enough to need them.
        self._token_ids = np.zeros((max_num_seqs, max_model_len + 1), dtype=np.int64)
        self._block_tables = np.zeros((num_tables(groups), max_num_seqs, max_blocks + 1), dtype=np.int32)
        states = [group for group in groups if not group.is_paged]
        self._zero_row = zero_row(states[0]) if states else 0
        self._state_rows = np.zeros((2, max_num_seqs), dtype=np.int64) if states else None
        """Per slot: the rows that the chunk which was taken in last reads its state from and writes it to."""
        self._mrope_delta = np.zeros(max_num_seqs, dtype=np.int64)
        self._mrope_end = np.zeros(max_num_seqs, dtype=np.int64)
        """Per slot: first position behind those that the request brings M-RoPE positions for."""
        self._media_end = np.zeros(max_num_seqs, dtype=np.int64)
        """Per slot: first position behind the last media span and the last two-way span."""
        self._adapter_ids = np.zeros(max_num_seqs, dtype=np.int64)
        self._num_adapted = 0
        """Requests here that have an adapter."""
        self._num_two_way = 0
        """Requests here that have two-way spans."""
        self._num_pairs = 0
        """Requests here whose rows belong to one text or the other."""
        self._num_known = np.zeros(max_num_seqs, dtype=np.int64)
        """Per slot: leading tokens of the sequence that are known."""
        self._states: dict[str, SlotState] = {}
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, request_id: str) -> SlotState:
        return self._states[request_id]

    def hold(self, states: Sequence[SlotState]) -> list[bool]:
        """Which of these requests still have the slots that they had then."""
        now = self._states
        return [now.get(state.request.request_id) is state for state in states]

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._states

    def add(self, new: NewRequest) -> SlotState:
        """Give a request a slot, with all its known tokens."""
        request = new.request
        assert request.request_id not in self._states, f"{request.request_id} already has a slot"
        slot = self._free_slots.pop()
        num_prompt = len(request.prompt_token_ids)
        num_tokens = num_prompt + len(new.output_token_ids)
        self._token_ids[slot, :num_prompt] = request.prompt_token_ids
        self._token_ids[slot, num_prompt:num_tokens] = new.output_token_ids
        self._mrope_delta[slot] = request.mrope_delta
        self._mrope_end[slot] = 0 if request.mrope_positions is None else num_prompt
        self._adapter_ids[slot] = request.adapter_id
        self._num_adapted += request.adapter_id != 0
        self._num_two_way += bool(request.two_way_spans)
        self._num_pairs += request.token_type_ids is not None
        self._num_known[slot] = num_tokens
        state = SlotState.create(request, slot)
        state.num_blocks = [0] * len(self.groups)
        self._media_end[slot] = state.media_end
        self._states[request.request_id] = state
        return state

    def remove(self, request_id: str) -> SlotState | None:
        """Free a request's slot; None if it had none (it never ran)."""
        state = self._states.pop(request_id, None)
        if state is not None:
            self._free_slots.append(state.slot)
            self._num_adapted -= state.request.adapter_id != 0
            self._num_two_way -= bool(state.request.two_way_spans)
            self._num_pairs -= state.request.token_type_ids is not None
        return state

    def append_blocks(self, chunk: ScheduledChunk) -> None:
        """Add a chunk's new blocks to its request's tables, and note where its state is and goes."""
        state = self._states[chunk.request_id]
        for index, (group, ids) in enumerate(zip(self.groups, chunk.new_block_ids, strict=True)):
            if not group.is_paged:
                assert self._state_rows is not None
                source, target = ids
                self._state_rows[:, state.slot] = (self._zero_row if source == NO_BLOCK else source, target)
            elif ids:
                # Entries without a block are never read, but must be valid block ids.
                block_ids = np.maximum(np.array(ids, dtype=np.int32), 0)
                first = state.num_blocks[index]
                if self._device_tables is not None:
                    self._device_tables.append(index, state.slot, first, block_ids)
                state.num_blocks[index] = first + len(ids)
                self._block_tables[index, state.slot, first : first + len(ids)] = block_ids

    def is_all_decodes(self, arrays: StepArrays) -> bool:
        """Whether every chunk is one row that stands behind its request's media."""
        if len(arrays.token_ids) != len(arrays.slots):
            return False
        return bool((arrays.seq_lens > self._media_end[arrays.slots]).all())

    def write_drafts(self, chunk: ScheduledChunk) -> None:
        """Put a chunk's drafts where its last rows read them, as if they were known; `append_sampled` says what is."""
        slot, end = self._states[chunk.request_id].slot, chunk.num_computed_tokens + chunk.num_scheduled_tokens
        self._token_ids[slot, end - len(chunk.draft_token_ids) : end] = chunk.draft_token_ids
        self._num_known[slot] = end

    def append_sampled(self, slots: Int64Array, positions: Int64Array, token_ids: Int64Array) -> None:
        """Record sampled tokens of these slots, each at its position in the sequence; all `(num_rows,)`. The last one
        of a slot ends what is known of it."""
        self._token_ids[slots, positions] = token_ids
        self._num_known[slots] = positions + 1

    def token_ids(self, request_id: str, start: int, end: int) -> Int64Array:
        """Known tokens `[start, end)` of a request; a view."""
        return self._token_ids[self._states[request_id].slot, start:end]

    def states(self, chunks: Sequence[ScheduledChunk]) -> list[SlotState]:
        """The requests of these chunks."""
        states = self._states
        return [states[chunk.request_id] for chunk in chunks]

    def gather(self, chunks: Sequence[ScheduledChunk]) -> StepArrays:
        """The flat batch of these chunks.

        Worked example: chunks of 1 and 3 rows starting at positions 5 and 0 give `cu_seqlens_q [0, 1, 4]` and
        `positions [5, 0, 1, 2]`.
        """
        num_chunks = len(chunks)
        slots = np.array([state.slot for state in self.states(chunks)], dtype=np.int64)
        computed = np.array([chunk.num_computed_tokens for chunk in chunks], dtype=np.int64)
        lens = np.array([chunk.num_scheduled_tokens for chunk in chunks], dtype=np.int64)
        cu_seqlens_q = np.zeros(num_chunks + 1, dtype=np.int32)
        np.cumsum(lens, out=cu_seqlens_q[1:])
        num_tokens = int(cu_seqlens_q[-1])
        if num_tokens == num_chunks:  # every chunk is one row: nothing to repeat
            row_slots, positions = slots, computed
        else:
            row_slots = np.repeat(slots, lens)
            positions = np.arange(num_tokens) + np.repeat(computed - cu_seqlens_q[:-1], lens)
        block_index, block_offset = np.divmod(positions, self.block_size)
        seq_lens = (computed + lens).astype(np.int32)
        is_pending = positions >= self._num_known[row_slots]
        cross_lens, cross_slots, cross_before = self._cross_rows(chunks)
        return StepArrays(
            token_ids=self._token_ids[row_slots, positions],
            positions=self._mrope_positions(chunks, positions, row_slots, cu_seqlens_q)
            if self.uses_mrope
            else positions,
            slot_mapping=self._slot_mapping(row_slots, block_index, block_offset),
            query_lens=lens.astype(np.int32),
            seq_lens=seq_lens,
            max_blocks=-(-int(seq_lens.max(initial=0)) // self.block_size),
            cu_seqlens_q=cu_seqlens_q,
            slots=slots,
            state_rows=None if self._state_rows is None else self._state_rows[:, slots],
            pending_slots=np.where(is_pending, row_slots, -1) if is_pending.any() else None,
            adapter_ids=self._adapter_ids_of(row_slots),
            row_spans=self._row_spans(chunks, lens, seq_lens, positions)
            if self._num_two_way and (computed < self._media_end[slots]).any()
            else None,
            cross_lens=cross_lens,
            cross_slots=cross_slots,
            cross_before=cross_before,
        )

    def _slot_mapping(self, row_slots: Int64Array, block_index: Int64Array, block_offset: Int64Array) -> Int64Array:
        """`(num_tables, num_tokens)`"""
        tables = self._block_tables
        if len(tables) == 1:  # a plain index costs less
            blocks: Int64Array = tables[0][row_slots, block_index]
            return (blocks * np.int64(self.block_size) + block_offset)[np.newaxis]
        return tables[:, row_slots, block_index] * np.int64(self.block_size) + block_offset

    def _cross_rows(
        self, chunks: Sequence[ScheduledChunk]
    ) -> tuple[npt.NDArray[np.int32] | None, Int64Array | None, npt.NDArray[np.int32] | None]:
        """`StepArrays.cross_lens`, `cross_slots` and `cross_before`."""
        if self._cross_index is None:
            return None, None, None
        before = np.zeros(len(chunks), dtype=np.int32)
        lens, slots = np.zeros(len(chunks), dtype=np.int32), [np.empty(0, dtype=np.int64)]
        for i, (chunk, state) in enumerate(zip(chunks, self.states(chunks), strict=True)):
            end = chunk.num_computed_tokens + chunk.num_scheduled_tokens
            for index, item in enumerate(state.request.media):
                if item.span.offset >= end:
                    break
                if index in chunk.cross_items:
                    rows = np.arange(lens[i], lens[i] + item.cross_rows, dtype=np.int64)
                    blocks = self._block_tables[self._cross_index, state.slot, rows // self.block_size]
                    slots.append(blocks * np.int64(self.block_size) + rows % self.block_size)
                before[i] = end < item.span.end
                lens[i] += item.cross_rows if before[i] else item.seen_rows
        return lens, np.concatenate(slots), before

    def token_type_ids(self, chunks: Sequence[ScheduledChunk]) -> Int64Array | None:
        """Which text of a pair each row belongs to, `(num_tokens,)`; None where no request has pairs."""
        if not self._num_pairs:
            return None
        parts = []
        for chunk, state in zip(chunks, self.states(chunks), strict=True):
            part = np.zeros(chunk.num_scheduled_tokens, dtype=np.int64)
            start = chunk.num_computed_tokens
            own = (state.request.token_type_ids or ())[start : start + len(part)]
            part[: len(own)] = own
            parts.append(part)
        return np.concatenate(parts)

    def written_items(self, chunk: ScheduledChunk) -> list[MediaItem]:
        """Items whose rows a chunk writes into the caches of cross-attention."""
        media = self._states[chunk.request_id].request.media
        return [media[index] for index in chunk.cross_items]

    def _adapter_ids_of(self, row_slots: Int64Array) -> Int64Array | None:
        if not self._num_adapted:
            return None
        adapter_ids = self._adapter_ids[row_slots]
        return adapter_ids if adapter_ids.any() else None

    def _row_spans(
        self, chunks: Sequence[ScheduledChunk], lens: Int64Array, seq_lens: npt.NDArray[np.int32], positions: Int64Array
    ) -> npt.NDArray[np.int32] | None:
        spans = [
            state.request.two_way_spans if chunk.num_computed_tokens < state.media_end else ()
            for chunk, state in zip(chunks, self.states(chunks), strict=True)
        ]
        rows = compute_row_spans(spans, lens, seq_lens)
        if rows is None:
            return None
        return np.stack([spans_in(group, rows, positions) for group in self.groups if group.is_paged])

    def block_tables(self, arrays: StepArrays) -> list[npt.NDArray[np.int32]]:
        """The block tables of a step's chunks in each group with blocks, `(num_chunks, max_blocks)`."""
        return [
            self._block_tables[index, :, :width].take(arrays.slots, axis=0)
            for index, width in enumerate(self.table_widths(arrays))
        ]

    def table_widths(self, arrays: StepArrays) -> list[int]:
        """Blocks of the longest sequence in each group with blocks."""
        widths = [arrays.max_blocks] * len(self._block_tables)
        if self._cross_index is not None and arrays.cross_lens is not None:
            widths[self._cross_index] = -(-int(arrays.cross_lens.max(initial=1)) // self.block_size)
        return widths

    def _mrope_positions(
        self,
        chunks: Sequence[ScheduledChunk],
        positions: Int64Array,
        row_slots: Int64Array,
        cu_seqlens_q: npt.NDArray[np.int32],
    ) -> Int64Array:
        """`(3, num_tokens)`: the request's own positions in the prompt, index plus delta behind it."""
        result = np.tile(positions + self._mrope_delta[row_slots], (3, 1))
        if not (positions < self._mrope_end[row_slots]).any():  # as in every pass of decodes
            return result
        for i, chunk in enumerate(chunks):
            request = self._states[chunk.request_id].request
            start = chunk.num_computed_tokens
            if request.mrope_positions is None or start >= len(request.prompt_token_ids):
                continue
            end = min(start + chunk.num_scheduled_tokens, len(request.prompt_token_ids))
            row = int(cu_seqlens_q[i])
            result[:, row : row + end - start] = request.mrope_positions[:, start:end]
        return result

    def media_rows(self, chunk: ScheduledChunk) -> list[MediaSlice]:
        """The media rows that fall into a chunk, item by item."""
        state = self._states[chunk.request_id]
        start, end = chunk.num_computed_tokens, chunk.num_computed_tokens + chunk.num_scheduled_tokens
        if start >= state.media_end:
            return []
        slices = []
        for item in state.request.media:
            if item.span.offset >= end or item.cross_rows:
                break
            rows = item.span.rows_in(start, end)
            if rows:
                slices.append(MediaSlice(item, item.span.positions(rows) - start, rows.start, rows.stop))
        return slices


@dataclass(frozen=True, slots=True, eq=False)
class MediaSlice:
    """Rows `[first, last)` of an item's encoder output stand at rows `chunk_rows` of a chunk."""

    item: MediaItem
    chunk_rows: npt.NDArray[np.intp]
    first: int
    last: int


def spans_in(group: CacheGroup, row_spans: npt.NDArray[np.int32], positions: Int64Array) -> npt.NDArray[np.int32]:
    """`(2, num_tokens)`: the rows' spans as a group's layers see them."""
    if group.spans is SpanRule.IGNORED:
        return np.zeros_like(row_spans)
    if group.spans is SpanRule.SEEN or group.reach is None:
        return row_spans
    is_window = group.kind is CacheKind.WINDOW
    first_seen = positions - (group.reach - 1) if is_window else positions // group.reach * group.reach
    bounded = row_spans.copy()
    np.maximum(row_spans[0], first_seen, out=bounded[0], casting="same_kind")
    return bounded
