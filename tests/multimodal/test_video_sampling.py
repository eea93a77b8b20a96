"""Which frames of a clip are taken, and that they come with their times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sensorium.errors import InvalidRequestError
from sensorium.media import EncodedMedia, MediaLoader, VideoSampling
from sensorium.media.encode import encode_video
from sensorium.multimodal.hashing import content_digest
from sensorium.multimodal.video_array import VideoArray
from sensorium.multimodal.video_sampling import CheckpointSampling
from tests.helpers.configs import make_model_config
from tests.helpers.processors import make_video
from tests.inputs.front import Calls, Front, features_of, keys_of, map_pictures, new_model


def sampling_of(
    path: Path, settings: Any = None, engine: Any = None, file: str = "video_preprocessor_config.json"
) -> CheckpointSampling:
    if settings is not None:
        (path / file).write_text(json.dumps(settings))
    return CheckpointSampling(make_model_config(model=path, mm_processor_kwargs=engine))


@pytest.mark.parametrize(
    ("settings", "engine", "request_kwargs", "expected"),
    [
        (None, None, {}, VideoSampling()),
        (None, None, {"num_frames": 4}, VideoSampling(num_frames=4)),
        (None, {"fps": 2.0}, {}, VideoSampling(fps=2.0)),
        (None, {"fps": 2.0}, {"num_frames": 4}, VideoSampling(num_frames=4)),
        ({"fps": 3.0}, None, {}, VideoSampling()),  # a rate alone: the checkpoint doesn't ask for sampling
        ({"fps": 3.0, "do_sample_frames": True}, None, {}, VideoSampling(fps=3.0)),
        ({"fps": 3.0, "do_sample_frames": True}, None, {"fps": 1.0}, VideoSampling(fps=1.0)),
        (
            {"video_processor_type": "Qwen2VLVideoProcessor", "max_frames": 16, "temporal_patch_size": 4},
            None,
            {"fps": 1.0, "min_frames": 2},
            VideoSampling(fps=1.0, rule="temporal_patches", max_frames=16, min_frames=2, temporal_patch_size=4),
        ),
    ],
)
def test_the_request_s_wish_comes_first_then_the_engine_s_then_the_checkpoint_s(
    tmp_path: Path, settings: Any, engine: Any, request_kwargs: Any, expected: VideoSampling
) -> None:
    assert sampling_of(tmp_path, settings, engine)(request_kwargs) == expected


def test_settings_may_be_in_the_older_file(tmp_path: Path) -> None:
    settings = {"num_frames": 5, "do_sample_frames": True}
    assert sampling_of(tmp_path, settings, file="preprocessor_config.json")({}) == VideoSampling(num_frames=5)


def test_wrong_wishes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="num_frames"):
        sampling_of(tmp_path)({"num_frames": -1})


def video_front(calls: Calls, **kwargs: Any) -> Front:
    model = new_model(mappers={"video": map_pictures("video", calls)}, processor=None)
    return Front(model, features=features_of(max_item_rows={}), media_loader=MediaLoader(), **kwargs)


def test_a_clip_is_an_array_that_knows_its_times() -> None:
    calls = Calls()
    front = video_front(calls)
    data = encode_video(make_video(8, 32, 32), fps=4.0)
    prompt = {"prompt": "<|video_pad|>", "multi_modal_data": {"video": [data]}}
    all_frames, sampled = (front({**prompt, "mm_processor_kwargs": kwargs}) for kwargs in ({}, {"num_frames": 2}))
    first, second = (data[0] for data in calls.of("video"))
    assert isinstance(first, VideoArray)
    assert first.shape == (8, 32, 32, 3)
    assert first.metadata is not None
    assert (first.metadata["fps"], first.metadata["total_num_frames"]) == (4.0, 8)
    assert isinstance(second, VideoArray)
    assert second.metadata is not None
    assert second.shape == (2, 32, 32, 3)
    assert second.metadata["frames_indices"] == [0, 4]
    assert keys_of(all_frames) != keys_of(sampled)


def test_frames_with_metadata_may_be_given() -> None:
    calls = Calls()
    front = video_front(calls)
    frames = make_video(2, 32, 32)
    keys = []
    for fps in (1.0, 2.0):
        clip = (frames, {"fps": fps})
        keys += keys_of(front({"prompt": "<|video_pad|>", "multi_modal_data": {"video": [clip]}}))
    assert [data[0].metadata for data in calls.of("video")] == [{"fps": 1.0}, {"fps": 2.0}]
    assert len(set(keys)) == 2


def test_what_is_made_of_the_frames_has_no_times_of_theirs() -> None:
    frames = VideoArray(np.zeros((4, 2, 2, 3)), {"fps": 1.0})
    assert frames.metadata == {"fps": 1.0}
    for made in (frames[::2], frames.copy()):
        assert isinstance(made, VideoArray)
        assert made.metadata is None
    assert type(np.asarray(frames)) is np.ndarray


def test_times_are_part_of_a_clip_s_content() -> None:
    frames = np.zeros((4, 2, 2, 3))
    values = [frames, *(VideoArray(frames, {"fps": fps}) for fps in (1.0, 2.0)), VideoArray(frames, {"fps": 1.0})[:]]
    assert len({content_digest(value) for value in values}) == 4
    assert content_digest(VideoArray(frames.copy(), {"fps": 1.0})) == content_digest(values[1])


def test_an_encoded_clip_keeps_the_sampling_it_was_fetched_with() -> None:
    calls = Calls()
    encoded = EncodedMedia("video", encode_video(make_video(8, 32, 32), fps=4.0), None, VideoSampling(num_frames=3))
    video_front(calls)({"prompt": "<|video_pad|>", "multi_modal_data": {"video": encoded}})
    assert calls.of("video")[0].shape[0] == 3
