"""What could never run is refused before it is queued, with a sentence that says what to change."""

from __future__ import annotations

import numpy as np
import pytest

from sensorium.config import CacheConfig, ModelFeatures, SchedulerConfig
from sensorium.errors import InvalidRequestError, OverloadedError
from sensorium.messages import EngineRequest, MediaItem
from sensorium.sampling_params import SamplingParams
from sensorium.scheduler import Scheduler
from sensorium.spans import Span
from tests.scheduler.simulation import full_attention, make_request


def make_scheduler(*, num_blocks: int = 8, max_model_len: int = 100, max_waiting: int | None = None) -> Scheduler:
    return Scheduler(
        SchedulerConfig(max_waiting_requests=max_waiting),
        CacheConfig(block_size=4),
        ModelFeatures(),
        cache_groups=full_attention(num_blocks, 4),
        max_model_len=max_model_len,
    )


def test_prompts_that_are_empty_or_leave_no_room_for_a_token() -> None:
    scheduler = make_scheduler(num_blocks=100, max_model_len=10)
    with pytest.raises(InvalidRequestError, match="prompt: got 0 tokens"):
        scheduler.add_request(make_request("r", [[]]))
    with pytest.raises(InvalidRequestError, match=r"too long to fit into the model: got 10 tokens.*max_model_len"):
        scheduler.add_request(make_request("r", [[1] * 10]))
    scheduler.add_request(make_request("r", [[1] * 9]))
    scheduler.add_request(make_request("p", [[1] * 10], pooling=True))


def test_requests_that_need_more_blocks_than_there_are() -> None:
    """32 slots: the last token of an output needs none, so 33 tokens in all fit."""
    scheduler = make_scheduler()
    with pytest.raises(InvalidRequestError, match=r"up to 33 tokens.*at most 32 \(num_blocks 8.*max_model_len"):
        scheduler.add_request(make_request("r", [[1] * 20], max_tokens=14))
    with pytest.raises(InvalidRequestError, match="up to 99 tokens"):
        scheduler.add_request(make_request("r", [[1] * 20], max_tokens=None))
    with pytest.raises(InvalidRequestError, match="up to 33 tokens"):
        scheduler.add_request(make_request("r", [[1] * 33], pooling=True))
    scheduler.add_request(make_request("r", [[1] * 20], max_tokens=13))
    assert scheduler.num_unfinished == 1


def test_an_id_in_use() -> None:
    scheduler = make_scheduler()
    scheduler.add_request(make_request("r", [[1]]))
    with pytest.raises(InvalidRequestError, match="request_id: got 'r'"):
        scheduler.add_request(make_request("r", [[1]]))
    scheduler.abort(["r"])
    scheduler.add_request(make_request("r", [[1]]))


def test_a_full_line() -> None:
    scheduler = make_scheduler(max_waiting=2)
    scheduler.add_request(make_request("a", [[1]]))
    scheduler.add_request(make_request("b", [[1]]))
    with pytest.raises(OverloadedError, match="max_waiting_requests") as caught:
        scheduler.add_request(make_request("c", [[1]]))
    assert caught.value.status == 429
    scheduler.schedule()
    scheduler.add_request(make_request("c", [[1]]))


@pytest.mark.parametrize(
    "media",
    [
        (MediaItem("image", "a", Span(5, 6)),),
        (MediaItem("image", "a", Span(-1, 2)),),
        (MediaItem("image", "a", Span(1, 0)),),
        (MediaItem("image", "a", Span(0, 4)), MediaItem("image", "b", Span(3, 2))),
        (MediaItem("image", "a", Span(4, 2)), MediaItem("image", "b", Span(0, 2))),
        (MediaItem("image", "a", Span(0, 4, np.array([0, 4]))),),
        (MediaItem("image", "a", Span(0, 4, np.array([-1, 2]))),),
        (MediaItem("image", "a", Span(0, 4, np.array([2, 1]))),),
        (MediaItem("image", "a", Span(0, 4, np.array([1, 1]))),),
        (MediaItem("image", "a", Span(0, 4, np.array([[0, 1]]))),),
    ],
)
def test_media_that_contradict_the_prompt(media: tuple[MediaItem, ...]) -> None:
    scheduler = make_scheduler()
    with pytest.raises(InvalidRequestError, match="placeholders"):
        scheduler.add_request(EngineRequest("r", [1] * 10, SamplingParams(), media=media))
    assert not scheduler.has_unfinished_requests()
