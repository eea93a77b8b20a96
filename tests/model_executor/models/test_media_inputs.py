"""Input processors: as many placeholders as rows, for every size; what doesn't fit is refused with both numbers."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoFeatureExtractor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

from sensorium.errors import InvalidRequestError, InvalidTypeError
from sensorium.inputs import INPUT_REGISTRY, InputContext
from sensorium.model_executor.models.media_common import check_embeddings, expand_placeholders, stacked
from sensorium.model_executor.models.qwen2_5_vl import seconds_per_step
from sensorium.model_executor.models.qwen_vl_inputs import VisionInputs, squares_of
from sensorium.multimodal import MULTIMODAL_REGISTRY
from sensorium.multimodal.video_array import VideoArray
from tests.helpers.checkpoints import make_checkpoint, make_tokenizer, token_ids
from tests.helpers.direct import engine_config, prepare
from tests.helpers.processors import make_image, make_video

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
PAD = 9
LIMITS = {"image": 3, "video": 2, "audio": 3}


def config_of(family: str, **settings: Any) -> Any:
    return engine_config(make_checkpoint(family), limit_mm_per_prompt=LIMITS, **settings)


# Placeholders


@pytest.mark.parametrize(
    ("tokens", "counts", "expected", "ranges"),
    [
        ([1, 9, 5, 9], [2, 3], [1, 9, 9, 5, 9, 9, 9], [(1, 2), (4, 3)]),
        ([9, 9], [1, 2], [9, 9, 9], [(0, 1), (1, 2)]),
        ([1, 9, 9, 5, 9, 9, 9], [2, 3], [1, 9, 9, 5, 9, 9, 9], [(1, 2), (4, 3)]),  # expanded before
        ([9, 9, 9, 9, 9], [2, 3], [9, 9, 9, 9, 9], [(0, 2), (2, 3)]),  # expanded before, side by side
        ([9, 2], [1], [9, 2], [(0, 1)]),
    ],
)
def test_placeholders_expand(
    tokens: list[int], counts: list[int], expected: list[int], ranges: list[tuple[int, int]]
) -> None:
    expanded, found = expand_placeholders(tokens, {PAD: counts}, {PAD: "image"}, 100)
    assert expanded == expected
    assert [(each["offset"], each["length"]) for each in found[PAD]] == ranges


def test_placeholders_of_two_modalities_shift_one_another() -> None:
    expanded, found = expand_placeholders([8, 9, 8], {9: [3], 8: [2, 1]}, {9: "image", 8: "video"}, 100)
    assert expanded == [8, 8, 9, 9, 9, 8]
    assert [each["offset"] for each in found[8]] == [0, 5]
    assert [each["offset"] for each in found[9]] == [2]


@pytest.mark.parametrize("tokens", [[1, 2], [9], [9, 9, 9], [9] * 6])
def test_a_wrong_number_of_placeholders_is_refused(tokens: list[int]) -> None:
    with pytest.raises(InvalidRequestError, match=rf"image placeholders.*got {tokens.count(9)}, expected 2"):
        expand_placeholders(tokens, {PAD: [2, 3]}, {PAD: "image"}, 100)


def test_nothing_is_expanded_beyond_the_models_length() -> None:
    """A request may ask for any number of rows by its pixel bounds; that many placeholders were once written first."""
    with pytest.raises(InvalidRequestError, match=r"too long to fit into the model: got \d+ \(\d+ from 1 image item"):
        expand_placeholders([1, 9, 1], {PAD: [10**12]}, {PAD: "image"}, 100)
    with pytest.raises(InvalidRequestError, match="too long to fit into the model"):
        prepare(config_of("qwen2_vl"), IMAGE, {"image": make_image()}, min_pixels=10**12, max_pixels=10**13)


def test_an_expanded_item_must_be_in_one_piece() -> None:
    with pytest.raises(InvalidRequestError, match="run shorter than 3"):
        expand_placeholders([9, 9, 9, 9, 1, 9, 9], {PAD: [3, 3]}, {PAD: "image"}, 100)


def test_stacking_is_undone() -> None:
    images = torch.arange(2 * 3 * 4.0).view(2, 3, 2, 2)
    assert torch.equal(stacked(images[:, None], 3), images)
    assert torch.equal(stacked([images[None, 0], [images[1]]], 3), images)
    assert torch.equal(stacked([images[0].view(3, 4), images[1].view(1, 3, 4)], 1), images.view(6, 4))


# Given rows


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (np.zeros((2, 8)), InvalidTypeError, "got ndarray"),
        (torch.zeros(2, 8, dtype=torch.int64), InvalidTypeError, "floating-point"),
        (torch.zeros(2, 7), InvalidRequestError, r"shape \(2, 7\)"),
        (torch.zeros(8), InvalidRequestError, r"shape \(8,\)"),
        (torch.zeros(0, 8), InvalidRequestError, r"shape \(0, 8\)"),
        (torch.zeros(3, 8), InvalidRequestError, "got 3 rows, expected 2"),
        (torch.full((2, 8), torch.nan), InvalidRequestError, "not finite"),
        (torch.zeros(2, 8).to_sparse(), InvalidRequestError, "dense"),
    ],
)
def test_given_rows_that_do_not_fit_are_refused(rows: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_embeddings(rows, 2, 8, "image_embeds")


# Qwen2-VL


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("size", [(28, 28), (100, 60), (61, 333), (500, 500), (1, 150), (87, 13)])
def test_rows_of_images_equal_their_grids(family: str, size: tuple[int, int]) -> None:
    prepared = prepare(config_of(family), f"a{IMAGE}b", {"image": make_image(*size)})
    num_rows = int(prepared.kwargs["image_grid_thw"].prod()) // 4
    assert prepared.token_ids.count(token_ids()["<|image_pad|>"]) == num_rows
    assert prepared.placeholders["image"] == [{"offset": 2, "length": num_rows}]


@pytest.mark.parametrize("size", [(1, 28, 28), (2, 60, 90), (5, 100, 40), (8, 300, 200)])
def test_rows_of_clips_equal_their_grids(size: tuple[int, int, int]) -> None:
    prepared = prepare(config_of("qwen2_vl"), f"a{VIDEO}b", {"video": make_video(*size)})
    num_rows = int(prepared.kwargs["video_grid_thw"].prod()) // 4
    assert prepared.token_ids.count(token_ids()["<|video_pad|>"]) == num_rows


@pytest.mark.parametrize("settings", [{"max_pixels": 6 * 784}, {"min_pixels": 20 * 784}])
def test_pixel_bounds_of_a_request_count_for_processor_and_mapper(settings: dict[str, int]) -> None:
    image = make_image(110, 110)
    usual = prepare(config_of("qwen2_vl"), IMAGE, {"image": image})
    prepared = prepare(config_of("qwen2_vl"), IMAGE, {"image": image}, **settings)
    assert len(prepared.token_ids) != len(usual.token_ids)
    assert prepared.token_ids.count(token_ids()["<|image_pad|>"]) == int(prepared.kwargs["image_grid_thw"].prod()) // 4


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"image": torch.zeros(4, 64)}, InvalidTypeError, "Invalid image type: got Tensor"),
        ({"image": {"image_embeds": torch.zeros(4, 64)}}, InvalidTypeError, "image_grid_thw"),
        (
            {"image": {"image_embeds": torch.zeros(5, 64), "image_grid_thw": torch.tensor([[1, 4, 4]])}},
            InvalidRequestError,
            "got 5 rows, expected 4",
        ),
        (
            {"image": {"image_embeds": torch.zeros(4, 64), "image_grid_thw": torch.tensor([[1, 3, 4]])}},
            InvalidRequestError,
            r"got \(1, 3, 4\)",
        ),
        (
            {"image": {"image_embeds": torch.zeros(4, 64), "image_grid_thw": torch.tensor([[-1, 4, 4]])}},
            InvalidRequestError,
            r"got \(-1, 4, 4\)",
        ),
        ({"video": make_image()}, InvalidTypeError, "Invalid video type"),
        ({"image": make_image(10, 3000)}, InvalidRequestError, "aspect ratio"),
    ],
)
def test_what_no_grid_follows_from_is_refused(data: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prepare(config_of("qwen2_vl"), f"{IMAGE}{VIDEO}" if "video" in data else IMAGE, data)


# Qwen3-VL


@pytest.mark.parametrize("size", [(2, 60, 90), (5, 100, 40), (8, 300, 200), (3, 20, 10), (40, 28, 28)])
def test_clips_count_their_pixels_together(size: tuple[int, int, int]) -> None:
    """A frame's size is Hugging Face's, and follows from the number of frames."""
    prepared = prepare(config_of("qwen3_vl"), f"a{VIDEO}b", {"video": make_video(*size)})
    expected = smart_resize(*size, 2, 28, 8 * 28 * 28, 40 * 28 * 28)
    t, h, w = prepared.kwargs["video_grid_thw"][0].tolist()
    assert (t, 14 * h, 14 * w) == (-(-size[0] // 2), *expected)
    assert prepared.token_ids.count(token_ids()["<|video_pad|>"]) == t * h * w // 4
    assert len(prepared.kwargs["pixel_values_videos"]) == t * h * w


@pytest.mark.parametrize("settings", [{}, {"cap_pixels_per_frame": True, "max_video_tokens": 6}])
@pytest.mark.parametrize(("max_rows", "largest"), [(2000, 2000), (11, 11), (4, 4), (1, 4)])
def test_a_clip_may_fill_any_room(settings: dict[str, Any], max_rows: int, largest: int) -> None:
    """The bound on all its pixels allows 20 rows, but each frame has one at least, whatever their number."""
    inputs = VisionInputs(InputContext(config_of("qwen3_vl").model_config), "video", **settings)
    assert inputs.num_rows(inputs.grid_of_size(*inputs.largest_size(max_rows))) == largest


def test_steps_of_a_clip_stand_behind_their_times() -> None:
    metadata = {"fps": 24.0, "frames_indices": [0, 12, 24, 36, 49], "total_num_frames": 60}
    config = config_of("qwen3_vl")
    clip = VideoArray(make_video(5, 56, 56), metadata)
    prepared = prepare(config, f"a{VIDEO}b", {"video": clip})
    text = make_tokenizer().decode(prepared.token_ids)
    step = "<|vision_start|>" + 4 * "<|video_pad|>" + "<|vision_end|>"
    steps = f"<0.2 seconds>{step}<1.2 seconds>{step}<2.0 seconds>{step}"
    assert text == f"a<|vision_start|>{steps}<|vision_end|>b"
    assert prepare(config, prepared.token_ids, {"video": clip}).token_ids == prepared.token_ids  # expanded before
    without = prepare(config, f"a{VIDEO}b", {"video": make_video(5, 56, 56)})
    times = re.findall(r"<([0-9.]+) seconds>", make_tokenizer().decode(without.token_ids))
    assert times == ["0.0", "0.1", "0.2"]  # of 24 frames a second


def test_rows_in_the_place_of_media_are_refused_where_they_are_not_enough() -> None:
    given = {"image_embeds": torch.zeros(4, 64), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    with pytest.raises(InvalidRequestError, match="rows are not enough: send the media"):
        prepare(config_of("qwen3_vl"), IMAGE, {"image": given})


@pytest.mark.parametrize("num_squares", [1, 2, 7, 24, 199, 211, 397, 16384])
def test_the_largest_rectangle_is_as_large_as_any(num_squares: int) -> None:
    height, width = squares_of(num_squares)
    assert height <= width <= 200 * height
    pairs = [(h, w) for h in range(1, num_squares + 1) for w in range(h, min(200 * h, num_squares // h) + 1)]
    assert height * width == max(h * w for h, w in pairs)


@pytest.mark.parametrize("max_model_len", [2048, 20])
def test_no_picture_has_more_rows_than_the_stated_maximum(max_model_len: int) -> None:
    """Strips may exceed the processor's own bound on pixels; the maximum knows."""
    config = config_of("qwen2_vl", max_model_len=max_model_len)
    most = MULTIMODAL_REGISTRY.get_max_tokens_per_item_by_modality(config.model_config)["image"]
    inputs = VisionInputs(InputContext(config.model_config), "image")
    sides = [1, 2, 10, 13, 20, 28, 30, 56, 84, 100, 112, 140, 168, 224, 336, 500, 672, 2000, 4000, 5600]
    rows = [
        inputs.num_rows(inputs.grid_of_size(1, height, width))
        for height in sides
        for width in sides
        if max(height, width) <= 200 * min(height, width)
    ]
    assert most == max(row for row in rows if row < max_model_len)


def test_seconds_of_a_clip_follow_from_its_metadata() -> None:
    frames = make_video(4)
    every_third = VideoArray(frames, {"fps": 30.0, "total_num_frames": 12, "frames_indices": [0, 3, 6, 9]})
    assert seconds_per_step(every_third, 2).item() == pytest.approx(2 / 10)
    assert seconds_per_step(VideoArray(frames, {"fps": 8.0}), 2).item() == pytest.approx(2 / 8)
    assert seconds_per_step(frames, 2).item() == pytest.approx(2 / 24)
    grid = {"video_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 2]])}
    assert seconds_per_step(grid, 2).tolist() == [1, 1]
    assert seconds_per_step(grid | {"second_per_grid_ts": [0.5, 2]}, 2).tolist() == [0.5, 2]


def test_a_clips_time_moves_its_positions() -> None:
    frames = make_video(6)
    slow, fast = (
        prepare(config_of("qwen2_5_vl"), VIDEO, {"video": VideoArray(frames, {"fps": fps})}) for fps in (1.0, 4.0)
    )
    assert slow.positions[0].max() > fast.positions[0].max()
    assert np.array_equal(slow.positions[1:], fast.positions[1:])


# Qwen2-Audio


@pytest.mark.parametrize("num_samples", [321, 480, 481, 640, 3333, 8000, 15999, 16000, 17000])
@pytest.mark.parametrize("rate", [16000, 8000, 44100])
def test_rows_of_sounds_equal_the_feature_extractors_mask(num_samples: int, rate: int) -> None:
    config = config_of("qwen2_audio")
    samples = np.random.default_rng(0).standard_normal(num_samples * rate // 16000 + 1).astype(np.float32)
    prepared = prepare(config, "<|AUDIO|>", {"audio": (samples, rate)})
    num_frames = int(prepared.kwargs["feature_attention_mask"].sum())
    assert len(prepared.token_ids) == ((num_frames - 1) // 2 + 1 - 2) // 2 + 1


@pytest.mark.parametrize("rate", [16000, 8000, 44100])
@pytest.mark.parametrize("name", ["qwen2_audio", "qwen2_5_omni_thinker"])
def test_sounds_longer_than_what_is_heard_are_refused(name: str, rate: int) -> None:
    """What lay behind the end of what a model hears was dropped without a word, online and offline."""
    sound = (np.zeros(2 * rate, np.float32), rate)
    with pytest.raises(InvalidRequestError, match=r"got a sound of 2\.0 s, expected at most the 1 s"):
        prepare(config_of(name), "<|AUDIO|>", {"audio": sound})


def test_features_are_those_of_the_feature_extractor() -> None:
    path = make_checkpoint("qwen2_audio")
    samples = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    prepared = prepare(engine_config(path), "<|AUDIO|>", {"audio": samples})
    expected = AutoFeatureExtractor.from_pretrained(path)(
        samples, sampling_rate=16000, return_tensors="pt", padding="max_length"
    )
    assert torch.equal(prepared.kwargs["input_features"], expected["input_features"])


@pytest.mark.parametrize(
    ("sound", "error", "message"),
    [
        (np.zeros(100, np.float32), InvalidRequestError, "audio too short: got 100 samples"),
        (np.zeros((2, 8000), np.float32), InvalidTypeError, r"shape \(2, 8000\)"),
        (np.full(8000, np.nan, np.float32), InvalidRequestError, "not finite"),
        ((np.zeros(8000, np.float32), 0), InvalidRequestError, "positive rate"),
        ((np.zeros(8000, np.float32), float("nan")), InvalidRequestError, "positive rate"),
        ("noise.wav", InvalidTypeError, "Invalid audio type"),
        (torch.zeros(3, 5), InvalidRequestError, r"audio_embeds: got shape \(3, 5\)"),
    ],
)
def test_sounds_that_give_no_rows_are_refused(sound: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prepare(config_of("qwen2_audio"), "<|AUDIO|>", {"audio": sound})


# Dummy data


@pytest.mark.parametrize("seq_len", [2048, 60])
@pytest.mark.parametrize("family", ["gemma3_vision", "llava", "llava_siglip", "qwen2_vl", "qwen2_5_vl", "qwen2_audio"])
def test_dummy_data_is_the_worst_legal_input(family: str, seq_len: int) -> None:
    """As many items as the limits allow, placeholders that equal their rows, no item above the stated maximum."""
    config = config_of(family).model_config
    MULTIMODAL_REGISTRY.init_mm_limits_per_prompt(config)
    dummy = INPUT_REGISTRY.dummy_data_for_profiling(config, seq_len, MULTIMODAL_REGISTRY)
    most = MULTIMODAL_REGISTRY.get_max_tokens_per_item_by_modality(config)
    assert dummy.multi_modal_data is not None
    tokens = list(dummy.seq_data.prompt_token_ids)
    for modality, items in dummy.multi_modal_data.items():
        assert len(items) == LIMITS[modality]
        (token_id,) = MULTIMODAL_REGISTRY.get_placeholder_token_ids(config, modality) or ()
        mapped = MULTIMODAL_REGISTRY.map_input(config, {modality: items})
        rows_per_item = tokens.count(token_id) // len(items)
        grids = mapped.get(f"{modality}_grid_thw")
        if grids is not None:
            assert [int(grid.prod()) // 4 for grid in grids] == [rows_per_item] * len(items)
        assert rows_per_item == most[modality] if seq_len == 2048 and modality != "video" else rows_per_item > 0


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_audio"])
def test_dummy_data_without_media_is_text(family: str) -> None:
    path = make_checkpoint(family)
    config = engine_config(path, limit_mm_per_prompt=dict.fromkeys(LIMITS, 0)).model_config
    MULTIMODAL_REGISTRY.init_mm_limits_per_prompt(config)
    dummy = INPUT_REGISTRY.dummy_data_for_profiling(config, 100, MULTIMODAL_REGISTRY)
    assert not dummy.multi_modal_data
    assert len(dummy.seq_data.prompt_token_ids) == 100
