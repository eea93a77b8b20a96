"""M-RoPE positions equal Hugging Face's, and behave where the reference gives up."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from sensorium.errors import InvalidRequestError
from sensorium.multimodal.mrope import MRopeBox, get_mrope_positions, mrope_positions

IMAGE, VIDEO, TEXT = 60, 61, 5


def config_of(family: str) -> Any:
    ids = {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": 62,
        "vision_end_token_id": 63,
    }
    if family == "qwen2_vl":
        return Qwen2VLConfig(vision_config={"spatial_merge_size": 2}, **ids)
    return Qwen2_5_VLConfig(vision_config={"spatial_merge_size": 2, "tokens_per_second": 4}, **ids)


def reference(config: Any, ids: list[int], images: list[Any], videos: list[Any], seconds: list[float] | None) -> Any:
    """Hugging Face's own method, called on an object that has only what it reads."""
    model: Any = Qwen2VLModel if isinstance(config, Qwen2VLConfig) else Qwen2_5_VLModel
    stand_in = SimpleNamespace(config=config)
    stand_in.get_vision_position_ids = lambda *args, **kwargs: model.get_vision_position_ids(stand_in, *args, **kwargs)
    token_ids = torch.tensor([ids])
    extra = {} if seconds is None else {"second_per_grid_ts": torch.tensor(seconds)}
    positions, delta = model.get_rope_index(
        stand_in,
        token_ids,
        mm_token_type_ids=(token_ids == IMAGE).int() + 2 * (token_ids == VIDEO).int(),
        image_grid_thw=torch.tensor(images) if images else None,
        video_grid_thw=torch.tensor(videos) if videos else None,
        **extra,
    )
    return positions[:, 0].numpy(), int(delta[0])


def random_prompt(rng: np.random.Generator, num_items: int) -> tuple[list[int], list[Any], list[Any]]:
    """Media between texts of at least one token, which the reference needs to tell neighbours apart."""
    ids: list[int] = [TEXT] * int(rng.integers(1, 6))
    images: list[Any] = []
    videos: list[Any] = []
    for _ in range(num_items):
        is_image = bool(rng.integers(2))
        grid = [1 if is_image else int(rng.integers(1, 6)), *(2 * rng.integers(1, 6, size=2)).tolist()]
        (images if is_image else videos).append(grid)
        ids += [IMAGE if is_image else VIDEO] * (grid[0] * grid[1] * grid[2] // 4)
        ids += [TEXT] * int(rng.integers(1, 6))
    return ids, images, videos


def has_times_of_the_paper() -> bool:
    """Whether the installed transformers takes parts of a second into account; versions about 5.17 cut them off."""
    return "int(next(second_per_grid_ts))" not in inspect.getsource(Qwen2_5_VLModel.get_rope_index)


WITH_TIMES = pytest.mark.skipif(
    not has_times_of_the_paper(), reason="this version of transformers cuts times off to whole seconds"
)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", pytest.param("qwen2_5_vl with times", marks=WITH_TIMES)])
def test_positions_equal_hugging_face_on_random_mixes(family: str) -> None:
    rng = np.random.default_rng(3)
    config = config_of(family.partition(" ")[0])
    for _ in range(40):
        ids, images, videos = random_prompt(rng, int(rng.integers(0, 5)))
        seconds = rng.uniform(0.05, 3.0, len(videos)).astype(np.float32).tolist() if "times" in family else None
        expected, expected_delta = reference(config, ids, images, videos, seconds)
        positions, delta = get_mrope_positions(
            ids,
            hf_config=config,
            image_grid_thw=torch.tensor(images) if images else None,
            video_grid_thw=videos or None,
            second_per_grid_ts=seconds,
        )
        assert positions.dtype == np.int64
        np.testing.assert_array_equal(positions, expected)
        assert delta == expected_delta


@WITH_TIMES
def test_times_are_rounded_as_in_hugging_face() -> None:
    # 10 frames of 4 * 0.175 positions are 6.9999999: in single precision 7, in double precision cut off to 6.
    config = config_of("qwen2_5_vl")
    ids, grids, seconds = [TEXT] + [VIDEO] * 11, [[11, 2, 2]], [0.175]
    expected, _ = reference(config, ids, [], grids, seconds)
    positions, _ = get_mrope_positions(ids, hf_config=config, video_grid_thw=grids, second_per_grid_ts=seconds)
    np.testing.assert_array_equal(positions, expected)
    assert positions[0, -1] == 1 + 7


def test_worked_example_of_the_docstring() -> None:
    positions, delta = mrope_positions(7, [MRopeBox(offset=2, t=1, h=2, w=2)])
    assert positions.tolist() == [[0, 1, 2, 2, 2, 2, 4], [0, 1, 2, 2, 3, 3, 4], [0, 1, 2, 3, 2, 3, 4]]
    assert delta == -2


def test_text_alone_counts_on() -> None:
    positions, delta = mrope_positions(5, [])
    assert positions.tolist() == [list(range(5))] * 3
    assert delta == 0


def test_neighbours_without_separator_are_told_apart_by_their_grids() -> None:
    config = config_of("qwen2_vl")
    ids = [TEXT] + [IMAGE] * (2 + 6) + [TEXT]
    positions, _ = get_mrope_positions(ids, hf_config=config, image_grid_thw=[[1, 2, 4], [1, 4, 6]])
    apart = mrope_positions(10, [MRopeBox(1, 1, 1, 2), MRopeBox(3, 1, 2, 3)])[0]
    np.testing.assert_array_equal(positions, apart)


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        ([TEXT, IMAGE, TEXT], [[1, 4, 4]], "got 1 in the prompt, expected 4"),
        ([IMAGE] * 4, None, "got 4 in the prompt, expected 0"),
        ([IMAGE, IMAGE, TEXT, IMAGE, IMAGE], [[1, 4, 4]], "other tokens inside"),
    ],
)
def test_tokens_that_do_not_match_the_grids_are_refused(ids: list[int], grids: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        get_mrope_positions(ids, hf_config=config_of("qwen2_vl"), image_grid_thw=grids)


def test_one_time_for_each_video() -> None:
    config = config_of("qwen2_5_vl")
    with pytest.raises(InvalidRequestError, match="second_per_grid_ts: got 2 values, expected one for each of 1"):
        get_mrope_positions([VIDEO], hf_config=config, video_grid_thw=[[1, 2, 2]], second_per_grid_ts=[1.0, 2.0])
