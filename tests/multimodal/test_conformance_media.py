"""The built-in mappers of pictures and videos, and the helpers that model files call."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import BatchFeature, LlamaConfig

from sensorium.errors import InvalidRequestError, InvalidTypeError, ProcessorError, SensoriumError
from sensorium.model_executor.models.interfaces import SupportsMultiModal
from sensorium.multimodal import MULTIMODAL_REGISTRY, MultiModalKwargs
from sensorium.multimodal.audio import resample_audio
from sensorium.multimodal.hf_processors import cached_get_image_processor
from sensorium.multimodal.image import rescale_image_size, smart_resize
from sensorium.multimodal.utils import (
    cached_get_tokenizer,
    consecutive_placeholder_ranges,
    is_list_of,
    repeat_and_pad_placeholder_tokens,
    repeat_and_pad_token,
)
from sensorium.multimodal.video import rescale_video_size, resize_video, sample_frames_from_video
from tests.helpers.configs import make_model_config
from tests.helpers.processors import make_image, make_tokenizer, make_video, save_llava, save_qwen2_vl
from tests.helpers.waiting import HANG_S


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def qwen2_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen2_vl(tmp_path_factory.mktemp("qwen2_vl"))


@MULTIMODAL_REGISTRY.register_image_input_mapper()
@MULTIMODAL_REGISTRY.register_input_mapper("video")
class Model(nn.Module, SupportsMultiModal):
    pass


def map_media(path: Path, modality: str, data: Any) -> MultiModalKwargs:
    config = make_model_config(Model, model=path, limits={"image": 9, "video": 9})
    MULTIMODAL_REGISTRY.init_mm_limits_per_prompt(config)
    return MULTIMODAL_REGISTRY.map_input(config, {modality: data})


# Images


@pytest.mark.parametrize("checkpoint", ["llava", "qwen2_vl"])
@pytest.mark.parametrize(
    "data",
    [
        make_image(40, 30),
        [make_image(64, 64)],
        [make_image(56, 84, seed=1), make_image(84, 56, seed=2)],
        make_image(40, 30, mode="L"),
        make_image(40, 30, mode="RGBA"),
        make_image(3, 3),
    ],
)
def test_the_default_image_mapper_equals_the_hugging_face_processor(
    checkpoint: str, data: Any, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(checkpoint)
    expected = cached_get_image_processor(str(path)).preprocess(data, return_tensors="pt")
    mapped = map_media(path, "image", data)
    assert set(mapped) == set(expected)
    for key, value in expected.items():
        assert torch.equal(mapped[key], value)


@pytest.mark.parametrize("data", [torch.ones(2, 3), [torch.ones(2, 3), torch.zeros(1, 3)]])
def test_tensors_are_embeddings(llava: Path, data: Any) -> None:
    assert map_media(llava, "image", data)["image_embeds"] is data


def test_what_a_processor_returned_passes_through(llava: Path) -> None:
    feature = BatchFeature({"pixel_values": torch.ones(1, 3, 28, 28)})
    assert map_media(llava, "image", feature)["pixel_values"] is feature["pixel_values"]


@pytest.mark.parametrize(
    "data", [None, "path.png", 3, np.zeros((4, 4, 3)), b"bytes", ("a", "b"), [make_image(), torch.ones(2)], [None]]
)
def test_other_image_types_are_a_type_error(llava: Path, data: Any) -> None:
    with pytest.raises(TypeError, match="Invalid image type") as caught:
        map_media(llava, "image", data)
    assert isinstance(caught.value, InvalidTypeError)


def test_a_picture_that_the_processor_refuses_is_that_requests_error(qwen2_vl: Path) -> None:
    with pytest.raises(RuntimeError, match="can't process this input") as caught:
        map_media(qwen2_vl, "image", make_image(1000, 2))
    assert isinstance(caught.value, ProcessorError)


@pytest.mark.parametrize(("width", "height"), [(1, 10000), (10000, 1)])
def test_a_thin_picture_that_would_become_huge_is_refused(llava: Path, width: int, height: int) -> None:
    """With a shortest edge of 28, one pixel by 10,000 becomes 28 by 280,000; at 224, it is half a gigapixel."""
    assert map_media(llava, "image", Image.new("RGB", (width, height)))["pixel_values"].shape == (1, 3, 28, 28)
    model_config = make_model_config(Model, model=llava, mm_processor_kwargs={"size": {"shortest_edge": 224}})
    MULTIMODAL_REGISTRY.init_mm_limits_per_prompt(model_config)
    for data in ({"image": Image.new("RGB", (width, height))}, {"video": np.zeros((1, height, width, 3), np.uint8)}):
        with pytest.raises(ValueError, match=f"{height}x{width} pixels would become 501760000 behind the processor"):
            MULTIMODAL_REGISTRY.map_input(model_config, data)


@pytest.mark.parametrize(
    ("checkpoint", "settings"),
    [
        ("llava", {"size": {"height": 100_000, "width": 100_000}}),
        ("llava", {"size": {"shortest_edge": 100_000}}),
        ("llava", {"crop_size": {"height": 100_000, "width": 100_000}}),
        ("qwen2_vl", {"min_pixels": 10**12, "max_pixels": 10**12}),
        ("qwen2_vl", {"size": {"shortest_edge": 10**12, "longest_edge": 10**12}}),
    ],
)
def test_a_request_cannot_ask_for_a_huge_size(
    checkpoint: str, settings: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    config = make_model_config(Model, model=request.getfixturevalue(checkpoint))
    MULTIMODAL_REGISTRY.init_mm_limits_per_prompt(config)
    for data in ({"image": make_image()}, {"video": make_video()}):
        with pytest.raises(InvalidRequestError, match="expected at most 33554432"):
            MULTIMODAL_REGISTRY.map_input(config, data, settings)


def test_a_clip_has_a_bound_over_all_frames(qwen2_vl: Path) -> None:
    frames = np.broadcast_to(np.zeros((1, 56, 56, 3), np.uint8), (100_000, 56, 56, 3))
    with pytest.raises(InvalidRequestError, match="video of 100000 frames"):
        map_media(qwen2_vl, "video", frames)


def test_settings_are_plain_values(llava: Path) -> None:
    with pytest.raises(TypeError, match="plain values"):
        cached_get_image_processor(str(llava), image_mean=np.zeros(3))


@pytest.mark.parametrize(("modality", "data"), [("image", make_image()), ("video", make_video())])
def test_a_checkpoint_without_an_image_processor_is_that_requests_error(
    tmp_path: Path, modality: str, data: Any
) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="No HuggingFace processor is available") as caught:
        map_media(tmp_path, modality, data)
    assert isinstance(caught.value, SensoriumError)


def test_a_setting_that_the_processor_refuses_is_that_requests_error(qwen2_vl: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"size.*got .enormous."):
        cached_get_image_processor(str(qwen2_vl), size="enormous")


def test_processors_are_kept_per_checkpoint_and_settings(qwen2_vl: Path) -> None:
    path = str(qwen2_vl)
    assert cached_get_image_processor(path) is cached_get_image_processor(path)
    size = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    one, other = cached_get_image_processor(path, size=size), cached_get_image_processor(path, size=dict(size))
    assert one is other
    assert one is not cached_get_image_processor(path)
    assert one is not cached_get_image_processor(path, size={**size, "shortest_edge": 28 * 28})


def test_processors_come_without_warnings_or_noise(llava: Path, caplog: pytest.LogCaptureFixture) -> None:
    cached_get_image_processor.__globals__["_image_processor"].cache_clear()
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        processor = cached_get_image_processor(str(llava))
    assert type(processor).__name__ == "CLIPImageProcessorPil"
    assert not caplog.records


BROKEN_PACKAGE = 'raise RuntimeError("torchvision was built for another torch")'


def test_an_installed_torchvision_is_never_imported(llava: Path, tmp_path: Path) -> None:
    """A CUDA torchvision beside a CPU torch fails on import; transformers imports it wherever it is installed."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(BROKEN_PACKAGE)
    metadata = tmp_path / "torchvision-0.99.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.99.0\n")
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from sensorium.multimodal.hf_processors import cached_get_image_processor, cached_get_processor
        processor = cached_get_image_processor({str(llava)!r})
        assert type(processor).__name__ == "CLIPImageProcessorPil", processor
        assert type(cached_get_processor({str(llava)!r})).__name__ == "LlavaProcessor"
        assert "torchvision" not in sys.modules
        try:
            import torchvision
        except RuntimeError:
            print("untouched")
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=HANG_S, check=False
    )
    assert result.stdout.strip() == "untouched", result.stderr


# Videos


def test_a_still_clip_has_the_patches_of_its_picture(qwen2_vl: Path) -> None:
    """Qwen2-VL sees a picture as two equal frames, so a clip of them must come out as the picture does."""
    image = make_image(84, 56)
    expected = map_media(qwen2_vl, "image", image)
    mapped = map_media(qwen2_vl, "video", np.stack([np.asarray(image)] * 2))
    assert set(mapped) == {"pixel_values_videos", "video_grid_thw"}
    assert torch.equal(mapped["video_grid_thw"], expected["image_grid_thw"])
    # The picture needs no resizing, so only the rounding of the normalization may differ.
    torch.testing.assert_close(mapped["pixel_values_videos"], expected["pixel_values"], atol=1e-6, rtol=1e-6)


def test_a_resized_clip_is_close_to_its_resized_picture(qwen2_vl: Path) -> None:
    """PIL and torch round twice, along rows and columns, so a smooth picture may differ by two steps of 255."""
    ramp = np.linspace(0, 255, 100 * 75 * 3).reshape(75, 100, 3).astype(np.uint8)
    image = Image.fromarray(ramp)
    expected = map_media(qwen2_vl, "image", image)
    mapped = map_media(qwen2_vl, "video", np.stack([np.asarray(image)] * 2))
    assert mapped["video_grid_thw"].tolist() == expected["image_grid_thw"].tolist()
    step = 1 / 255 / 0.26
    assert (mapped["pixel_values_videos"] - expected["pixel_values"]).abs().max() < 2.1 * step


def test_frames_are_laid_out_in_space_time_patches(qwen2_vl: Path) -> None:
    """The order of patches is: time, square, row and column in the square, channel, frame, pixel."""
    video = make_video(4, 56, 84)
    mapped = map_media(qwen2_vl, "video", video)
    assert mapped["video_grid_thw"].tolist() == [[2, 4, 6]]
    patches = mapped["pixel_values_videos"].reshape(2, 2, 3, 2, 2, 3, 2, 14, 14)
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    normalized = torch.from_numpy((video / 255 - mean) / std).float()
    rng = np.random.default_rng(0)
    for _ in range(50):
        t, row, column, r, c, channel, frame, y, x = (int(rng.integers(n)) for n in patches.shape)
        pixel = normalized[2 * t + frame, 28 * row + 14 * r + y, 28 * column + 14 * c + x, channel]
        assert patches[t, row, column, r, c, channel, frame, y, x] == pytest.approx(float(pixel), abs=1e-5)


def test_an_odd_clip_is_filled_up_with_its_last_frame(qwen2_vl: Path) -> None:
    video = make_video(3)
    mapped = map_media(qwen2_vl, "video", video)
    filled = map_media(qwen2_vl, "video", np.concatenate([video, video[-1:]]))
    assert mapped["video_grid_thw"].tolist() == [[2, 4, 6]]
    assert torch.equal(mapped["pixel_values_videos"], filled["pixel_values_videos"])


def test_several_clips_are_mapped_one_behind_the_other(qwen2_vl: Path) -> None:
    clips = [make_video(2, 56, 56, seed=1), make_video(4, 84, 56, seed=2)]
    mapped = map_media(qwen2_vl, "video", clips)
    assert mapped["video_grid_thw"].tolist() == [[1, 4, 4], [2, 6, 4]]
    alone = [map_media(qwen2_vl, "video", clip)["pixel_values_videos"] for clip in clips]
    assert torch.equal(mapped["pixel_values_videos"], torch.cat(alone))
    listed = map_media(qwen2_vl, "video", clips[:1])
    assert torch.equal(listed["pixel_values_videos"], alone[0])


def test_videos_obey_the_files_of_the_checkpoint(tmp_path: Path) -> None:
    """Settings come from the most specific file; pixel bounds hold for each frame."""
    save_qwen2_vl(tmp_path)
    video = make_video(2, 112, 112)
    assert map_media(tmp_path, "video", video)["video_grid_thw"].tolist() == [[1, 8, 8]]
    other = tmp_path / "other"
    save_qwen2_vl(other)
    (other / "video_preprocessor_config.json").write_text(
        '{"video_processor_type": "Qwen2VLVideoProcessor", "size": {"shortest_edge": 784, "longest_edge": 3136}}'
    )
    assert map_media(other, "video", video)["video_grid_thw"].tolist() == [[1, 4, 4]]
    (other / "processor_config.json").write_text(
        '{"video_processor": {"video_processor_type": "Qwen2VLVideoProcessor", "min_pixels": 784, "max_pixels": 784}}'
    )
    third = tmp_path / "third"
    other.rename(third)
    assert map_media(third, "video", video)["video_grid_thw"].tolist() == [[1, 2, 2]]


def test_other_models_get_frames(llava: Path) -> None:
    video = make_video(3, 40, 30)
    mapped = map_media(llava, "video", video)
    assert mapped["pixel_values_videos"].shape == (1, 3, 3, 28, 28)
    processor = cached_get_image_processor(str(llava))
    frames = processor.preprocess(list(video.transpose(0, 3, 1, 2)), return_tensors="pt")["pixel_values"]
    assert torch.equal(mapped["pixel_values_videos"][0], frames)
    several = map_media(llava, "video", [video, make_video(3, 40, 30, seed=1)])
    assert several["pixel_values_videos"].shape == (2, 3, 3, 28, 28)


@pytest.mark.parametrize(
    ("model_type", "height", "width", "shape"),
    [
        ("llava_next_video", 300, 400, (224, 224)),
        ("llava_next_video", 100, 90, (224, 224)),
        ("llava_onevision", 300, 400, (384, 384)),
    ],
)
@pytest.mark.parametrize("crop", ["", ', "crop_size": 32'])
def test_base_video_processors_resize_and_crop(
    tmp_path: Path, model_type: str, height: int, width: int, shape: tuple[int, int], crop: str
) -> None:
    (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    (tmp_path / "preprocessor_config.json").write_text(f'{{"do_normalize": true{crop}}}')
    if crop and model_type == "llava_next_video":
        shape = (32, 32)
    mapped = map_media(tmp_path, "video", make_video(2, height, width))
    assert mapped["pixel_values_videos"].shape == (1, 2, 3, *shape)


def test_a_video_processor_that_is_not_computed_here_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)  # as if there were none
    (tmp_path / "video_preprocessor_config.json").write_text('{"video_processor_type": "Glm4vVideoProcessor"}')
    with pytest.raises(RuntimeError, match=r"Glm4vVideoProcessor.*torchvision.*register_video_input_mapper"):
        map_media(tmp_path, "video", make_video())


@pytest.mark.parametrize("data", [None, "path.mp4", make_image(), torch.ones(2, 3), [make_video(), "x"]])
def test_other_video_types_are_a_type_error(qwen2_vl: Path, data: Any) -> None:
    with pytest.raises(TypeError, match="Invalid video type"):
        map_media(qwen2_vl, "video", data)


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 56, 56), np.uint8),
        np.zeros((2, 3, 56, 56), np.uint8),
        np.zeros((2, 56, 56, 4), np.uint8),
        np.zeros((0, 56, 56, 3), np.uint8),
        np.zeros((2, 56, 56, 3), bool),
    ],
)
def test_frames_of_another_shape_are_a_type_error(qwen2_vl: Path, frames: Any) -> None:
    """The layout of frames is known, never guessed from which axis happens to be small."""
    with pytest.raises(TypeError, match=r"expected \(num_frames, height, width, 3\)"):
        map_media(qwen2_vl, "video", frames)


def test_a_setting_of_a_video_must_be_a_positive_number(qwen2_vl: Path) -> None:
    config = make_model_config(Model, model=qwen2_vl)
    MULTIMODAL_REGISTRY.init_mm_limits_per_prompt(config)
    for bad in ({"max_pixels": 0}, {"max_pixels": "many"}, {"patch_size": -1}):
        with pytest.raises(ValueError, match="expected a positive integer"):
            MULTIMODAL_REGISTRY.map_input(config, {"video": make_video()}, bad)
    for bad in ({"size": "large"}, {"size": {"height": 3}}, {"crop_size": [1, 2]}):
        with pytest.raises(ValueError, match="mm_processor_kwargs"):
            MULTIMODAL_REGISTRY.map_input(config, {"video": make_video()}, bad)
    smaller = MULTIMODAL_REGISTRY.map_input(config, {"video": make_video()}, {"max_pixels": 28 * 56})
    assert smaller["video_grid_thw"].tolist() == [[2, 2, 2]]


# Helpers


def test_rescaling_and_transposing_an_image() -> None:
    image = make_image(40, 30)
    assert rescale_image_size(image, 0.5).size == (20, 15)
    assert rescale_image_size(image, 1.0, transpose=Image.Transpose.ROTATE_90).size == (30, 40)


def test_resizing_rescaling_and_sampling_frames() -> None:
    video = make_video(10, 30, 40)
    assert resize_video(video, (15, 20)).shape == (10, 15, 20, 3)
    assert rescale_video_size(video, 0.5).shape == (10, 15, 20, 3)
    assert sample_frames_from_video(video, -1) is video
    sampled = sample_frames_from_video(video, 4)
    assert np.array_equal(sampled, video[[0, 3, 6, 9]])


def test_resampling_audio() -> None:
    t = np.arange(8000) / 8000
    resampled = resample_audio(np.sin(2 * np.pi * 100 * t), orig_sr=8000, target_sr=16000)
    assert resampled.shape == (16000,)
    expected = np.sin(2 * np.pi * 100 * np.arange(16000) / 16000)
    assert np.abs(resampled - expected)[1000:-1000].max() < 1e-3


@pytest.mark.parametrize(
    ("height", "width", "bounds", "expected"),
    [
        (100, 75, (3136, 1003520), (112, 84)),
        (1, 1, (3136, 1003520), (56, 56)),
        (10, 30, (3136, 1003520), (56, 112)),
        (4000, 3000, (3136, 28 * 28 * 100), (308, 224)),
        (14, 14, (1, 100), (28, 28)),
        (200, 1, (3136, 1003520), (812, 28)),
    ],
)
def test_smart_resize(height: int, width: int, bounds: tuple[int, int], expected: tuple[int, int]) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference

    size = smart_resize(height, width, 28, *bounds)
    assert size == expected
    assert size == reference(height, width, 28, *bounds)


def test_smart_resize_refuses_extreme_ratios() -> None:
    with pytest.raises(InvalidRequestError, match="aspect ratio of at most 200"):
        smart_resize(201, 1, 28, 3136, 1003520)


@pytest.mark.parametrize(
    ("value", "check", "expected"),
    [
        ([], "first", True),
        ([], "all", True),
        ([1, "a"], "first", True),
        ([1, "a"], "all", False),
        (["a", 1], "first", False),
        ((1, 2), "first", False),
        ("text", "first", False),
    ],
)
def test_is_list_of(value: Any, check: Any, expected: bool) -> None:
    assert is_list_of(value, int, check=check) is expected


def test_repeat_and_pad_token() -> None:
    assert repeat_and_pad_token(7) == [7]
    assert repeat_and_pad_token(7, repeat_count=2, pad_token_left=1, pad_token_right=2) == [1, 7, 7, 2]
    assert repeat_and_pad_token("P", repeat_count=0, pad_token_left="<") == ["<"]
    assert repeat_and_pad_token(7, pad_token_left=0) == [0, 7]


def test_consecutive_placeholder_ranges() -> None:
    assert consecutive_placeholder_ranges(0, 5) == []
    assert consecutive_placeholder_ranges(2, 5, initial_offset=3) == [
        {"offset": 3, "length": 5},
        {"offset": 8, "length": 5},
    ]


P = "<image>"


@pytest.mark.parametrize(
    ("prompt", "counts", "expected", "ranges"),
    [
        (P, 2, P * 2, [(0, 2)]),
        (P * 2, 2, P * 3, [(0, 2)]),
        (P * 2, [3, 2], P * 5, [(0, 3), (3, 2)]),
        (f"a b {P} c a {P} ?", [3, 2], f"a b {P * 3} c a {P * 2} ?", [(2, 3), (7, 2)]),
        (P, [3, 2], P * 3, [(0, 3)]),
        ("a b", 2, "a b", []),
    ],
)
@pytest.mark.parametrize("with_text", [True, False])
def test_repeat_and_pad_placeholder_tokens(
    prompt: str, counts: Any, expected: str, ranges: list[tuple[int, int]], with_text: bool
) -> None:
    tokenizer = make_tokenizer(P)
    image_token_id = tokenizer.convert_tokens_to_ids(P)
    text, ids, found = repeat_and_pad_placeholder_tokens(
        tokenizer,
        prompt if with_text else None,
        tokenizer.encode(prompt),
        placeholder_token_id=image_token_id,
        repeat_count=counts,
    )
    assert text == (expected if with_text else None)
    assert ids == tokenizer.encode(expected)
    assert [(r["offset"], r["length"]) for r in found] == ranges


def test_ranges_cover_pads() -> None:
    tokenizer = make_tokenizer(P, "<s>", "</s>")
    image, left, right = tokenizer.convert_tokens_to_ids([P, "<s>", "</s>"])
    text, ids, ranges = repeat_and_pad_placeholder_tokens(
        tokenizer,
        f"a {P}",
        tokenizer.encode(f"a {P}"),
        placeholder_token_id=image,
        repeat_count=2,
        pad_token_left=left,
        pad_token_right=right,
    )
    assert text == f"a <s>{P}{P}</s>"
    assert ids == [*tokenizer.encode("a"), left, image, image, right]
    assert ranges == [{"offset": 1, "length": 4}]


def test_surplus_items_and_handmade_expansions_warn(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer(P)
    image = tokenizer.convert_tokens_to_ids(P)
    expand = repeat_and_pad_placeholder_tokens
    expand(tokenizer, P, [image], placeholder_token_id=image, repeat_count=[1, 1])
    assert "surplus items" in caplog.text
    caplog.clear()
    expand(tokenizer, P * 17, [image] * 17, placeholder_token_id=image, repeat_count=1)
    assert "17 times" in caplog.text
    caplog.clear()
    expand(tokenizer, P * 16, [image] * 16, placeholder_token_id=image, repeat_count=1)
    assert not caplog.records


def test_tokenizers_are_kept(llava: Path) -> None:
    assert cached_get_tokenizer(str(llava)) is cached_get_tokenizer(str(llava))
    assert cached_get_tokenizer(str(llava), padding_side="left") is not cached_get_tokenizer(str(llava))
