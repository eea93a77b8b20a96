"""What V0's modules of towers had beside the towers: sizes, dummy data, input processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size

from sensorium.compat.v0.vllm.model_executor.models import blip, clip, pixtral, siglip
from sensorium.inputs import token_inputs
from sensorium.multimodal.inputs import PlaceholderRange
from tests.helpers.configs import make_model_config
from tests.helpers.processors import make_tokenizer

CLIP = transformers.CLIPVisionConfig(image_size=16, patch_size=4)
BLACK = Image.new("RGB", (16, 16))


def test_numbers_of_rows() -> None:
    assert clip.get_clip_patch_grid_length(image_size=16, patch_size=4) == 4
    assert clip.get_clip_num_patches(image_size=16, patch_size=4) == 16
    assert clip.get_max_clip_image_tokens(CLIP) == clip.get_clip_image_feature_size(CLIP) == 17
    assert siglip.get_siglip_num_patches(image_size=18, patch_size=4) == 16, "a rest is left out"
    assert siglip.get_max_siglip_image_tokens(CLIP) == siglip.get_siglip_image_feature_size(CLIP) == 16
    assert blip.get_max_blip_image_tokens(CLIP) == 16
    assert pixtral.get_max_pixtral_hf_image_tokens(CLIP) == 16
    with pytest.raises(AssertionError):
        clip.get_clip_patch_grid_length(image_size=18, patch_size=4)


@pytest.mark.parametrize("size", [(16, 16), (9, 13), (40, 13), (13, 41), (31, 64), (200, 1)])
def test_grid_of_a_picture_of_pixtral_is_that_of_the_processor(size: tuple[int, int]) -> None:
    if min(size) * 16 // max(size) == 0:
        expected = (1, 4)  # of which the processor itself makes nothing
    else:
        height, width = get_resize_output_image_size(np.zeros((*size, 3), np.uint8), size=16, patch_size=4)
        expected = (width // 4, height // 4)
    assert pixtral.get_pixtral_hf_image_feature_size(CLIP, size[1], size[0]) == expected


def test_dummy_sequences_are_those_of_both_kinds_of_release() -> None:
    """Since 0.6.4 a pair of sequence and ranges, before that the sequence."""
    dummy = siglip.dummy_seq_data_for_siglip(CLIP, 40, 2, image_token_id=7)
    sequence, ranges = dummy
    assert sequence.prompt_token_ids == dummy.prompt_token_ids == (7,) * 32 + (0,) * 8
    assert ranges == {"image": [PlaceholderRange(offset=0, length=16), PlaceholderRange(offset=16, length=16)]}
    settings: dict[str, Any] = {"image_token_id": 7, "image_feature_size_override": 5, "mm_key": "video"}
    sequence, ranges = clip.dummy_seq_data_for_clip(CLIP, 12, 1, **settings)
    assert sequence.prompt_token_ids == (7,) * 5 + (0,) * 7
    assert ranges == {"video": [PlaceholderRange(offset=0, length=5)]}


def test_dummy_pictures_and_videos() -> None:
    assert clip.dummy_image_for_clip(CLIP, 1)["image"].size == (16, 16)
    wide = blip.dummy_image_for_blip(CLIP, 2, image_width_override=30)["image"]
    assert [image.size for image in wide] == [(30, 16)] * 2
    [video] = siglip.dummy_video_for_siglip(CLIP, 3, image_height_override=20)["video"]
    assert video.shape == (3, 20, 16, 3)
    assert not video.any()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer = make_tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    tokenizer.save_pretrained(path)
    return path


def test_placeholders_of_pictures_of_one_size(folder: Path) -> None:
    config = make_model_config(model=folder)
    given = token_inputs([1, 9, 2, 9], multi_modal_data={"image": [BLACK, BLACK]})
    made = clip.input_processor_for_clip(config, CLIP, given, image_token_id=9)
    assert made["prompt_token_ids"] == [1, *[9] * 17, 2, *[9] * 17]
    assert [(each["offset"], each["length"]) for each in made["multi_modal_placeholders"]["image"]] == [
        (1, 17),
        (19, 17),
    ]
    assert given["prompt_token_ids"] == [1, 9, 2, 9], "the inputs are left as they are"
    rows = token_inputs([9], multi_modal_data={"image": np.zeros((1, 4, 8))})
    assert len(blip.input_processor_for_blip(config, CLIP, rows, image_token_id=9)["prompt_token_ids"]) == 4
    sizes = siglip.input_processor_for_siglip(config, CLIP, given, image_token_id=9, image_feature_size_override=[1, 2])
    assert sizes["prompt_token_ids"] == [1, 9, 2, 9, 9]
    assert clip.input_processor_for_clip(config, CLIP, made, image_token_id=9) is made, "done already"
    text = token_inputs([1])
    assert clip.input_processor_for_clip(config, CLIP, text, image_token_id=9) is text


def test_placeholders_of_pixtral(folder: Path) -> None:
    config = make_model_config(model=folder)
    tokenizer = make_tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    row, break_, end = tokenizer.convert_tokens_to_ids(["[IMG]", "[IMG_BREAK]", "[IMG_END]"])
    images = [Image.new("RGB", (8, 12)), Image.new("RGB", (12, 4))]
    given = token_inputs([1, row, row, 2], prompt="a[IMG][IMG]b", multi_modal_data={"image": images})
    made = pixtral.input_processor_for_pixtral_hf(config, CLIP, given, image_token_id=row)
    first, second = [row, row, break_, row, row, break_, row, row, end], [row, row, row, end]
    assert made["prompt_token_ids"] == [1, *first, *second, 2]
    assert made["prompt"] == "a" + "[IMG][IMG][IMG_BREAK]" * 2 + "[IMG][IMG][IMG_END]" + "[IMG]" * 3 + "[IMG_END]b"
    one = token_inputs([1, row], multi_modal_data={"image": images})
    with pytest.raises(ValueError, match="pictures of a prompt: got 2 for 1 placeholders"):
        pixtral.input_processor_for_pixtral_hf(config, CLIP, one, image_token_id=row)
    with pytest.raises(TypeError, match="expected PIL images"):
        pixtral.input_processor_for_pixtral_hf(
            config, CLIP, token_inputs([row], multi_modal_data={"image": "x"}), image_token_id=row
        )
