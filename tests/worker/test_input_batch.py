"""Slots keep requests' tokens; a step's arrays are gathered from them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensorium.cache_spec import CacheGroup, CacheKind, SpanRule
from sensorium.messages import EngineRequest, MediaItem, NewRequest, ScheduledChunk
from sensorium.sampling_params import SamplingParams
from sensorium.spans import Span
from sensorium.worker.input_batch import InputBatch
from tests.scheduler.simulation import full_attention


def request(request_id: str, prompt: list[int], **fields: object) -> EngineRequest:
    return EngineRequest(request_id, prompt, SamplingParams(max_tokens=4), **fields)  # type: ignore[arg-type]


def chunk(
    request_id: str, start: int, count: int, blocks: tuple[int, ...] = (), *, last: bool = False
) -> ScheduledChunk:
    return ScheduledChunk(request_id, start, count, (blocks,), is_last=last)


def make_batch(**options: bool) -> InputBatch:
    return InputBatch(4, 64, full_attention(16, 4), uses_mrope=options.get("uses_mrope", False))


def test_gathers_a_decode_and_a_prefill_chunk_into_one_flat_batch() -> None:
    batch = make_batch()
    batch.add(NewRequest(request("a", [10, 11, 12, 13]), output_token_ids=(14, 15)))
    batch.add(NewRequest(request("b", [20, 21, 22, 23, 24])))
    chunks = [chunk("a", 5, 1, (7, 2), last=True), chunk("b", 1, 3, (5,))]
    for each in chunks:
        batch.append_blocks(each)

    arrays = batch.gather(chunks)

    assert arrays.token_ids.tolist() == [15, 21, 22, 23]
    assert arrays.positions.tolist() == [5, 1, 2, 3]
    assert arrays.slot_mapping.tolist() == [[2 * 4 + 1, 5 * 4 + 1, 5 * 4 + 2, 5 * 4 + 3]]
    assert arrays.cu_seqlens_q.tolist() == [0, 1, 4]
    assert arrays.query_lens.tolist() == [1, 3]
    assert arrays.seq_lens.tolist() == [6, 4]
    assert batch.block_tables(arrays)[0][0].tolist() == [7, 2]


def test_rows_have_the_adapter_of_their_request() -> None:
    batch = make_batch()
    chunks = [chunk("a", 0, 2, (1,)), chunk("b", 0, 3, (2,)), chunk("c", 0, 1, (3,))]
    for each, adapter_id in zip(chunks, (0, 7, 2**40), strict=True):
        batch.add(NewRequest(request(each.request_id, [1, 2, 3], adapter_id=adapter_id)))
        batch.append_blocks(each)
    adapter_ids = batch.gather(chunks).adapter_ids
    assert adapter_ids is not None
    assert adapter_ids.tolist() == [0, 0, 7, 7, 7, 2**40]
    assert batch.gather(chunks[:1]).adapter_ids is None, "all rows are the base model's"
    batch.remove("b"), batch.remove("c")
    batch.add(NewRequest(request("d", [4])))
    batch.append_blocks(chunk("d", 0, 1, (4,)))
    assert batch.gather([chunk("d", 0, 1)]).adapter_ids is None, "a slot doesn't keep its last request's adapter"


def test_rows_know_the_span_that_they_see_both_ways_in_each_group() -> None:
    """A window of 3 may bound what a span adds, or a group may not look at spans at all."""
    kinds = [(CacheKind.FULL, None, SpanRule.SEEN), (CacheKind.WINDOW, 3, SpanRule.WITHIN_REACH)]
    kinds += [(CacheKind.WINDOW, 3, SpanRule.SEEN), (CacheKind.CHUNK, 4, SpanRule.WITHIN_REACH)]
    kinds += [(CacheKind.FULL, None, SpanRule.IGNORED)]
    groups = [CacheGroup(kind, 16, 4, reach, spans=rule) for kind, reach, rule in kinds]
    batch = InputBatch(4, 64, groups, uses_mrope=False)
    batch.add(NewRequest(request("a", [1] * 9, two_way_spans=((2, 7),)), output_token_ids=(14,)))
    batch.add(NewRequest(request("b", [2] * 4)))
    for each in ("a", "b"):
        batch.append_blocks(ScheduledChunk(each, 0, 1, ((1, 2, 3),) * 5, is_last=False))

    spans = batch.gather([chunk("b", 3, 1), chunk("a", 1, 7)]).row_spans

    assert spans is not None
    seen, within, beyond, chunked, ignored = spans.tolist()
    assert seen == beyond == [[0, 0, 2, 2, 2, 2, 2, 0], [0, 0, 7, 7, 7, 7, 7, 0]]
    assert within[0][2:7] == [2, 2, 2, 3, 4]
    assert chunked[0][2:7] == [2, 2, 4, 4, 4]
    assert within[1] == chunked[1] == seen[1]
    assert not any(map(any, ignored))
    assert batch.gather([chunk("b", 3, 1), chunk("a", 7, 2)]).row_spans is None, "no row is in a span"
    assert not batch.is_all_decodes(batch.gather([chunk("a", 6, 1)])), "a span's last row is no decode"
    assert batch.is_all_decodes(batch.gather([chunk("a", 9, 1)]))


def test_a_freed_slot_is_given_to_the_next_request_without_its_past() -> None:
    batch = make_batch()
    batch.add(NewRequest(request("a", [1, 2, 3])))
    batch.append_blocks(chunk("a", 0, 3, (9,)))
    freed = batch.remove("a")
    assert freed is not None
    assert batch.remove("a") is None

    state = batch.add(NewRequest(request("b", [4])))
    assert state.slot == freed.slot
    assert state.num_blocks == [0]
    assert batch.token_ids("b", 0, 1).tolist() == [4]


def test_mrope_positions_come_from_the_request_in_the_prompt_and_from_the_delta_behind_it() -> None:
    batch = make_batch(uses_mrope=True)
    own = np.array([[0, 1, 1, 3], [0, 1, 2, 3], [0, 2, 1, 3]])
    batch.add(NewRequest(request("a", [1, 2, 3, 4], mrope_positions=own, mrope_delta=-2), (5,)))
    chunks = [chunk("a", 2, 3, (0, 1))]
    batch.append_blocks(chunks[0])

    positions = batch.gather(chunks).positions

    assert positions.tolist() == [[1, 3, 2], [2, 3, 2], [1, 3, 2]]


@settings(max_examples=60)
@given(st.data())
def test_chunks_together_take_every_media_row_exactly_once(data: st.DataObject) -> None:
    """Wherever a prompt is cut, the slices of its items add up to the items, at the right rows."""
    length = data.draw(st.integers(8, 40))
    offset = data.draw(st.integers(0, length - 2))
    span = data.draw(st.integers(1, length - offset))
    mask = data.draw(st.none() | st.lists(st.booleans(), min_size=span, max_size=span).filter(any))
    item = MediaItem("image", "k", Span(offset, span) if mask is None else Span.of_mask(offset, mask))
    batch = make_batch()
    batch.add(NewRequest(request("a", list(range(length)), media=(item,))))
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=4)) | {0, length})

    rows: list[int] = []
    places: list[int] = []
    for start, end in itertools.pairwise(cuts):
        for piece in batch.media_rows(chunk("a", start, end - start)):
            rows.extend(range(piece.first, piece.last))
            places.extend((piece.chunk_rows + start).tolist())

    expected = offset + (np.arange(span) if mask is None else np.flatnonzero(mask))
    assert rows == list(range(item.span.num_rows))
    assert places == expected.tolist()


def test_a_request_can_not_hold_two_slots() -> None:
    batch = make_batch()
    batch.add(NewRequest(request("a", [1])))
    with pytest.raises(AssertionError, match="already has a slot"):
        batch.add(NewRequest(request("a", [1])))


def test_drafts_stand_behind_what_is_known_until_something_is_sampled() -> None:
    batch = make_batch()
    state = batch.add(NewRequest(request("a", [10, 11, 12])))
    slots = np.array([state.slot])
    drafted = ScheduledChunk("a", 2, 4, ((1, 2),), is_last=True, draft_token_ids=(20, 21, 22))
    batch.append_blocks(drafted)
    batch.write_drafts(drafted)
    arrays = batch.gather([drafted])
    assert arrays.token_ids.tolist() == [12, 20, 21, 22]
    assert arrays.positions.tolist() == [2, 3, 4, 5]
    assert arrays.pending_slots is None
    batch.append_sampled(np.repeat(slots, 2), np.array([3, 4]), np.array([20, 30]))  # the first one was right
    following = batch.gather([chunk("a", 4, 1, last=True)])
    assert following.token_ids.tolist() == [30]
    ahead = batch.gather([chunk("a", 5, 1, last=True)])
    assert ahead.pending_slots is not None, "what stands behind is not known any more"
