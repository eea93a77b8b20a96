"""Where a chunk may end: at a budget, before media that isn't encoded, never inside a piece that must stay whole.

A *piece* is a range of a prompt that no chunk may cut: a span whose positions see one another both ways, since the
first of them needs the last one's key; and, where a model takes items whole, an item.

Decides without changing anything; the step planner carries out what a draft says.

Worked example, chunk limit 8, an image at positions 5 to 11 that isn't encoded:
    encoder budget left      the chunk is [0, 8), and the image is encoded in this step
    none left                the chunk is [0, 5)
    items stay whole         the chunk is [0, 5); the next one holds the image, all of it
"""

from __future__ import annotations

import enum
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sensorium.cache_spec import CacheGroup, SpanRule
from sensorium.config import ModelFeatures
from sensorium.messages import EngineRequest, MediaItem
from sensorium.scheduler.encoder_cache_manager import EncoderCacheManager
from sensorium.scheduler.request import RequestState
from sensorium.scheduler.step_plan import StepPlan
from sensorium.spans import Range, merged


class Shortage(enum.Enum):
    """What a request would need for its next chunk and doesn't get in this step."""

    BUDGET = enum.auto()
    """Tokens, encoder rows or time of this step."""
    BLOCKS = enum.auto()
    """KV blocks."""
    ENCODER_CACHE = enum.auto()
    """Room in the encoder cache, which others hold."""


@dataclass(slots=True, eq=False)
class ChunkDraft:
    """A chunk `[start, end)` that could be scheduled, and the encoder entries that it takes."""

    start: int
    end: int
    least_end: int
    """Where it ends at the earliest."""
    encode: list[MediaItem] = field(default_factory=list)
    """Items to encode in this step."""
    hold: list[MediaItem] = field(default_factory=list)
    """Items whose rows the chunk reads, those to encode included."""
    num_rows: int = 0
    """Rows of `encode`."""
    num_newly_held_rows: int = 0
    cross_items: list[MediaItem] = field(default_factory=list)
    """Of `hold`: items whose rows the chunk writes into the caches of cross-attention."""
    lacks_cache: bool = False
    """The chunk was cut because the encoder cache is full of entries in use."""

    def has_key(self, key: str) -> bool:
        """Whether an item with this key is among `hold`."""
        return any(item.key == key for item in self.hold)


class ChunkPlanner:
    """Drafts chunks after the rules of one model and one configuration.

    Where a chunk may end goes by three flags, of the model and the configuration, and by the request's two-way spans:

        encodes  keeps items whole  keeps prompts whole   a chunk ends
        yes      no                 no                    anywhere but at a row that isn't encoded and can't be
        yes      yes                no                    outside of items, before the first that can't be encoded
        no       yes (always)       no                    outside of items; `forward` takes them whole
        any      any                yes                   at the prompt's end
        any      any                no                    outside of two-way spans, whatever else

    A chunk that must be whole may be larger than any step's budget (`may_exceed_budget`): then it gets a step alone.

    Whether an item that isn't encoded can be goes by four, of the step:

        is_encoder_closed       not if it takes room in the cache: somebody ahead waits for that
        is_alone                yes, if prompts are kept whole; room in the cache that others hold is still lacking
        no rows in it yet       however many rows the item has; else no more than `rows_left`
        no prefill in it yet    however long it takes, if the chunk can't end before the item, or if there are no rows
                                yet either and the tokens before it leave time; else only if its rows and its least
                                tokens do
    """

    def __init__(
        self,
        features: ModelFeatures,
        encoder_cache: EncoderCacheManager,
        *,
        enable_chunked_prefill: bool,
        snapshot_block_size: int | None = None,
        groups: Sequence[CacheGroup] = (),
        has_cross_rows: Callable[[RequestState], bool] = lambda _request: False,
    ) -> None:
        """`snapshot_block_size`: where what chunks leave behind is kept for others if they end at a block's end.
        `groups`: what layers keep.
        `has_cross_rows`: whether the rows of a request's items for cross-attention are there."""
        self._encodes = features.splits_media
        self.keeps_items_whole = features.atomic_items or not features.splits_media
        self.keeps_prompts_whole = not enable_chunked_prefill
        self._has_two_way = bool(features.two_way)
        self._cache = encoder_cache
        self._groups = groups
        self._has_cross_rows = has_cross_rows
        self._snapshot_block_size = None if self.keeps_prompts_whole else snapshot_block_size

    @property
    def may_exceed_budget(self) -> bool:
        """Whether there are chunks that can't be cut down to any budget."""
        return self.keeps_items_whole or self.keeps_prompts_whole or self._has_two_way

    def least_chunk_tokens(self, request: EngineRequest) -> int:
        """Tokens of the largest piece of a request that can't be parted."""
        if self.keeps_prompts_whole:
            return len(request.prompt_token_ids)
        return max((end - begin for begin, end in self._pieces_of(request)), default=1)

    def min_chunk(self, request: RequestState, start: int) -> int:
        """Fewest tokens that a chunk from `start` on may have."""
        if self.keeps_prompts_whole:
            return request.num_tokens - start
        return self._uncut(request, start + 1)[1] - start

    def round_prefix(self, request: RequestState, num_tokens: int, block_size: int) -> int:
        """The longest prefix of whole blocks within `num_tokens` behind which a chunk may begin.

        It ends in no item that is kept whole, and in a two-way span only where the rest of the span sees its beginning
        in all caches. Blocks of a span are found by all of it, so what follows them is what they were computed with.
        """
        while (piece := self._uncut(request, num_tokens))[0] < num_tokens:
            is_two_way = piece in request.message.two_way_spans
            if is_two_way and self._is_seen(piece[0], num_tokens):
                break
            num_tokens = (num_tokens - 1 if is_two_way else piece[0]) // block_size * block_size
        return num_tokens

    def _is_seen(self, begin: int, position: int) -> bool:
        """Whether layers that see a span from `begin` on have its keys in their caches when a chunk begins later."""
        return all(group.spans is not SpanRule.SEEN or group.first_visible(position) <= begin for group in self._groups)

    def _pieces_of(self, request: EngineRequest) -> list[Range]:
        items = [(item.span.offset, item.span.end) for item in request.media] if self.keeps_items_whole else []
        return merged((*items, *request.two_way_spans))

    def _uncut(self, request: RequestState, position: int) -> Range:
        """The piece in whose middle a position is; nothing at the position where a chunk may end there."""
        if request.pieces is None:
            request.pieces = self._pieces_of(request.message)
        at = bisect_right(request.pieces, position, key=_end_of)
        if at < len(request.pieces) and request.pieces[at][0] < position:
            return request.pieces[at]
        return position, position

    def draft(self, request: RequestState, plan: StepPlan, *, start: int, max_tokens: int) -> ChunkDraft | Shortage:
        """The longest chunk from `start` on that this step has room for, in a table of `max_tokens` tokens."""
        least = self.min_chunk(request, start)
        size = min(request.num_tokens - start, plan.tokens_left)
        if size < least:
            return Shortage.BUDGET
        room = plan.pace.token_room()
        if room < size:
            # The first prefill of a step may exceed the pace where it can't be cut: there must be progress.
            size = room if plan.num_prefill_tokens else max(room, least)
            if size < least:
                return Shortage.BUDGET
        if max_tokens - start < size:
            size = max_tokens - start
            if size < least:
                return Shortage.BLOCKS
        end = self._to_snapshot(request, start + least, start + size)
        draft = self._fit_media(request, ChunkDraft(start, self._cut(request, end), start + least), plan)
        if draft.end - start < least:
            return Shortage.ENCODER_CACHE if draft.lacks_cache else Shortage.BUDGET
        return draft

    def _to_snapshot(self, request: RequestState, least_end: int, end: int) -> int:
        """The end of a chunk that could reach to `end`, at a block's end if that is of use to others.

        A prompt's last chunk is cut behind its last full block, from which an equal prompt can go on. Worked example,
        blocks of 16: a prompt of 100 tokens is computed to 96 and then to its end.
        """
        if self._snapshot_block_size is None:
            return end
        if end < request.num_tokens:
            cut = end // self._snapshot_block_size * self._snapshot_block_size
        else:
            cut = (end - 1) // self._snapshot_block_size * self._snapshot_block_size
        return cut if cut >= least_end else end

    def _cut(self, request: RequestState, end: int) -> int:
        """Where a chunk that could reach to `end` may end."""
        return end if self.keeps_prompts_whole else self._uncut(request, end)[0]

    def _fit_media(self, request: RequestState, draft: ChunkDraft, plan: StepPlan) -> ChunkDraft:
        """A draft shortened to what the media in it allow."""
        last_row = draft.start - 1
        for item in request.media_from(draft.start):
            span = item.span
            if span.offset >= draft.end:
                break
            row = self._first_row(request, item, draft)
            if row is None or row >= draft.end:
                continue
            if not self._cover(request, item, row, draft, plan):
                end = self._cut(request, row)
                if last_row < end:
                    draft.end = end
                    break
                # A piece holds this item and others before it, which aren't needed without it.
                shorter = ChunkDraft(draft.start, end, draft.least_end, lacks_cache=draft.lacks_cache)
                return self._fit_media(request, shorter, plan)
            last_row = row
            if draft.encode and draft.encode[-1] is item and not self.keeps_prompts_whole:
                # Encoding takes time that the chunk's tokens no longer have.
                paced_end = draft.start + plan.pace.token_room(draft.num_rows)
                least_end = self._uncut(request, row + 1)[1]
                draft.end = min(draft.end, max(self._cut(request, paced_end), least_end))
        return draft

    def _first_row(self, request: RequestState, item: MediaItem, draft: ChunkDraft) -> int | None:
        """The first position in a draft that needs an item's rows; None where there is none."""
        if not item.cross_rows:
            return item.span.first_row_from(draft.start) if self._encodes else None
        for cut in (item.span.offset, item.span.end - 1):  # tokens of a chunk see the same rows
            if draft.start < cut < draft.end:
                draft.end = cut
        if item.span.offset < draft.start or self._has_cross_rows(request):
            return None
        if item.span.offset < draft.end:
            draft.cross_items.append(item)
        return item.span.offset

    def _cover(self, request: RequestState, item: MediaItem, row: int, draft: ChunkDraft, plan: StepPlan) -> bool:
        """Take an item into the draft, if it is encoded or can be in this step."""
        if not draft.has_key(item.key):
            newly_held = 0 if self._cache.is_held(item.key) else item.num_rows
            if newly_held:
                if plan.is_encoder_closed:
                    return False
                if not self._has_cache_room(newly_held, row, draft, plan, request):
                    draft.lacks_cache = True
                    return False
            if item.key not in self._cache:
                if not self._may_encode(request, item, row, draft, plan):
                    return False
                draft.encode.append(item)
                draft.num_rows += item.num_rows
            draft.num_newly_held_rows += newly_held
        draft.hold.append(item)
        return True

    def _has_cache_room(
        self, num_rows: int, row: int, draft: ChunkDraft, plan: StepPlan, request: RequestState
    ) -> bool:
        """An item larger than the whole cache is taken in when nothing else is held, and so are those that a chunk must
        have beside it."""
        num_held = self._cache.num_held_rows + draft.num_newly_held_rows
        if num_held == 0 or num_held + num_rows <= self._cache.capacity_rows:
            return True
        is_needed = bool(draft.hold) and row < draft.least_end and not self.keeps_prompts_whole
        return (is_needed or self._lifts_limits(plan)) and self._cache.is_held_only_by(request.request_id)

    def _may_encode(self, request: RequestState, item: MediaItem, row: int, draft: ChunkDraft, plan: StepPlan) -> bool:
        """Whether the step has rows and time for an item.

        The first item of a step may have any number of rows. An item that a step's first prefill can't do without may
        take any time: there must be progress.
        """
        if self._lifts_limits(plan):
            return True
        num_rows = draft.num_rows + item.num_rows
        is_first = plan.num_rows + draft.num_rows == 0
        if num_rows > plan.rows_left and not is_first:
            return False
        if not plan.num_prefill_tokens:
            if row < draft.least_end:
                return True
            if is_first:
                num_tokens_before = self._cut(request, row) - draft.start
                return num_tokens_before < plan.pace.token_room(num_rows)  # which is never 0 here
        least_end = draft.end if self.keeps_prompts_whole else self._uncut(request, row + 1)[1]
        return plan.pace.admits_rows(num_rows, least_end - draft.start)

    def _lifts_limits(self, plan: StepPlan) -> bool:
        """Whether a step must take all media of a prompt, however much that is."""
        return plan.is_alone and self.keeps_prompts_whole


def _end_of(piece: Range) -> int:
    return piece[1]
