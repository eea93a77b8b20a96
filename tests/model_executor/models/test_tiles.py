"""Pictures that are cut into tiles: tokens and tensors are those of Hugging Face's processors, for every shape."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from PIL import Image

from sensorium.errors import InvalidRequestError, InvalidTypeError
from sensorium.inputs import InputContext
from sensorium.model_executor.models.idefics3 import Idefics3Pictures
from sensorium.model_executor.models.internvl import InternVLPictures
from sensorium.model_executor.models.llava_next import LlavaNextPictures
from sensorium.model_executor.models.llava_onevision import LlavaOnevisionPictures
from sensorium.model_executor.models.media_common import expand_items
from sensorium.model_executor.models.media_inputs import PictureInputs, with_text_in_front
from sensorium.model_executor.models.pixtral import PixtralPictures
from sensorium.model_executor.models.tiles import bars, best_resolution, unpadded
from sensorium.multimodal import MULTIMODAL_REGISTRY
from sensorium.multimodal.byte_patches import as_processed
from sensorium.multimodal.byte_pictures import joined, map_pictures, picture_table
from sensorium.multimodal.hf_processors import cached_get_image_processor
from tests.helpers.checkpoints import make_checkpoint, make_tokenizer
from tests.helpers.direct import engine_config, prepare
from tests.helpers.processors import make_image, make_video

SIZES = [
    (56, 56),
    (60, 100),
    (200, 56),
    (28, 30),
    (1, 1),
    (1, 150),
    (400, 3),
    (57, 113),
    (500, 499),
    (113, 56),
    (80, 61),
]
"""Height and width in pixels."""
SIZES_OF = {"mistral3": [size for size in SIZES if max(size) <= 112 * min(size)]}
"""Of thinner pictures nothing is left within 112 pixels, and Hugging Face's processor fails."""
LIMITS = {"image": 3, "video": 1}
PICTURES: dict[str, type[PictureInputs]] = {
    "llava_next": LlavaNextPictures,
    "llava_onevision": LlavaOnevisionPictures,
    "internvl": InternVLPictures,
    "mistral3": PixtralPictures,
    "idefics3": Idefics3Pictures,
}
PLACEHOLDERS = {
    "llava_next": "<image>",
    "llava_onevision": "<image>",
    "internvl": "<IMG_CONTEXT>",
    "idefics3": "<image>",
}


@cache
def config_of(family: str, **settings: Any) -> Any:
    return engine_config(make_checkpoint(family), limit_mm_per_prompt=LIMITS, **settings)


def pictures_of(family: str, **settings: Any) -> PictureInputs:
    return PICTURES[family](InputContext(config_of(family).model_config), **settings)


def hf_processor(family: str) -> Any:
    """Hugging Face's whole processor, made of its parts, since loading it would ask for torchvision."""
    path, tokenizer = str(make_checkpoint(family)), make_tokenizer()
    parts = {"image_processor": cached_get_image_processor(path), "tokenizer": tokenizer}
    if family == "internvl":
        names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
        for name, token in {**names, "video_token": "<video>"}.items():
            setattr(tokenizer, name, token)
            setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    kind, settings = {
        "llava_next": (
            transformers.LlavaNextProcessor,
            {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        ),
        "llava_onevision": (
            transformers.LlavaOnevisionProcessor,
            {
                "num_image_tokens": 16,
                "vision_feature_select_strategy": "full",
                "vision_aspect_ratio": "anyres_max_2",
                "video_processor": None,
            },
        ),
        "internvl": (transformers.InternVLProcessor, {"image_seq_length": 4, "video_processor": None}),
        "idefics3": (transformers.Idefics3Processor, {"image_seq_len": 4}),
    }[family]

    class Unchecked(kind):  # type: ignore[misc,valid-type]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return type(argument)

    return Unchecked(**parts, **settings)


def hf_inputs(family: str, prompt: str, pictures: Any) -> dict[str, Any]:
    return dict(hf_processor(family)(images=pictures, text=[prompt], return_tensors="pt"))


@pytest.mark.parametrize("family", PLACEHOLDERS)
def test_tokens_and_tensors_are_those_of_hugging_faces_processor(family: str) -> None:
    for size in SIZES:
        picture = make_image(size[1], size[0])
        prompt = f"a {PLACEHOLDERS[family]}b"
        expected = hf_inputs(family, prompt, [picture])
        prepared = prepare(config_of(family), prompt, {"image": [picture]})
        assert prepared.token_ids == expected["input_ids"][0].tolist(), size
        assert torch.equal(as_processed(prepared.kwargs, 1)["pixel_values"], expected["pixel_values"]), size


@pytest.mark.parametrize("size", SIZES)
def test_several_pictures_of_a_prompt_are_one_tile_each(size: tuple[int, int]) -> None:
    """As LLaVA-OneVision's template hands them to Hugging Face's processor: as the pictures of one prompt."""
    pictures = [make_image(size[1], size[0], seed=1), make_image(70, 50, seed=2)]
    prompt = "<image> and <image>"
    expected = hf_inputs("llava_onevision", prompt, [pictures])
    prepared = prepare(config_of("llava_onevision"), prompt, {"image": pictures})
    assert prepared.token_ids == expected["input_ids"][0].tolist()
    processed = as_processed(prepared.kwargs, 1)
    assert torch.equal(joined([processed["pixel_values"]]), expected["pixel_values"])
    assert torch.equal(processed["image_sizes"], expected["image_sizes"])


def test_a_request_may_have_several_pictures_cut_or_one_not() -> None:
    config, picture = config_of("llava_onevision"), make_image(110, 60)
    usual = prepare(config, "<image>", {"image": [picture]})
    one_tile = prepare(config, "<image>", {"image": [picture]}, one_tile=True)
    both = prepare(config, "<image><image>", {"image": [picture] * 2}, one_tile=False)
    assert len(one_tile.token_ids) == 17
    assert len(both.token_ids) == 2 * len(usual.token_ids)


def test_rows_of_pixtral_end_in_breaks() -> None:
    """Of the picture resized to whole squares, here of 28 pixels; Hugging Face's processor needs torchvision."""
    tokenizer = make_tokenizer()
    for size in SIZES_OF["mistral3"]:
        prepared = prepare(config_of("mistral3"), "a[IMG]b", {"image": [make_image(size[1], size[0])]})
        height, width = prepared.kwargs["image_sizes"][0].tolist()
        assert tuple(prepared.kwargs["pixel_bytes"].shape) == (1, 3, height, width)
        line = "[IMG]" * (width // 28) + "[IMG_BREAK]"
        expected = (line * (height // 28)).removesuffix("[IMG_BREAK]") + "[IMG_END]"
        assert prepared.token_ids == tokenizer(f"a{expected}b")["input_ids"], size


def test_frames_of_a_clip_are_numbered() -> None:
    prepared = prepare(config_of("internvl"), "a<video>b", {"video": [make_video(2)]})
    frame = "<img>" + "<IMG_CONTEXT>" * 4 + "</img>"
    expected = f"aFrame1: {frame}\nFrame2: {frame}b"
    assert prepared.token_ids == make_tokenizer()(expected)["input_ids"]


def test_the_first_frame_s_number_joins_the_text_before_it() -> None:
    """Encoded with it, as Hugging Face's processor puts it into the text: " Frame" may be one token."""
    tokenizer = make_tokenizer()
    core = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.model = tokenizers.models.BPE({**core.get_vocab(), "\u0120F": 400}, [("\u0120", "F")])
    merging = transformers.PreTrainedTokenizerFast(tokenizer_object=core)
    [video] = merging.encode("<video>")
    ids = merging.encode("see <video> and <img><video>")
    expected = merging.encode("see Frame1: <video> and <img>Frame1: <video>")
    assert 400 in expected
    assert with_text_in_front(ids, video, "Frame1: ", merging) == expected


@pytest.mark.parametrize("max_model_len", [2048, 60])
@pytest.mark.parametrize("family", PICTURES)
def test_no_picture_has_more_rows_than_the_stated_maximum(family: str, max_model_len: int) -> None:
    config = config_of(family, max_model_len=max_model_len)
    most = MULTIMODAL_REGISTRY.get_max_tokens_per_item_by_modality(config.model_config)["image"]
    inputs = PICTURES[family](InputContext(config.model_config))
    sides = [8, 14, 28, 30, 55, 56, 57, 70, 84, 90, 100, 112, 113, 130, 168, 200, 350, 700]
    rows = []
    for height in sides:
        for width in sides:
            pieces = inputs.pieces_of_size((height, width))
            if sum(count for _, count in pieces) < max_model_len:
                rows.append(inputs.num_rows(pieces))
    assert max(rows) == most


def test_prompts_may_come_expanded() -> None:
    for family, placeholder in (("internvl", "<IMG_CONTEXT>"), ("idefics3", "<image>"), ("mistral3", "[IMG]")):
        pictures = {"image": [make_image(100, 60), make_image(60, 100)]}
        prepared = prepare(config_of(family), f"a{placeholder}b{placeholder}", pictures)
        again = prepare(config_of(family), prepared.token_ids, pictures)
        assert again.token_ids == prepared.token_ids
        assert again.placeholders == prepared.placeholders


def test_what_stands_for_an_item_may_have_any_tokens() -> None:
    items = [((7, 1), (9, 2), (8, 1)), ((7, 1), (9, 1), (8, 1))]
    expanded, ranges = expand_items([1, 9, 2, 9], {9: items}, {9: "image"}, 100)
    assert expanded == [1, 7, 9, 9, 8, 2, 7, 9, 8]
    assert [(each["offset"], each["length"]) for each in ranges[9]] == [(1, 4), (6, 3)]
    assert expand_items(expanded, {9: items}, {9: "image"}, 100) == (expanded, ranges)
    with pytest.raises(InvalidRequestError, match="run shorter than 3"):
        expand_items([7, 9, 8, 7, 9, 9, 8], {9: items}, {9: "image"}, 100)


@pytest.mark.parametrize(
    ("family", "data", "error", "message"),
    [
        ("mistral3", torch.zeros(4, 64), InvalidTypeError, "a dict with image_embeds and image_sizes"),
        ("mistral3", {"image_embeds": torch.zeros(4, 64)}, InvalidTypeError, "image_sizes"),
        (
            "mistral3",
            {"image_embeds": torch.zeros(4, 64), "image_sizes": torch.tensor([[28, 28]])},
            InvalidRequestError,
            "got 4 rows, expected 1",
        ),
        (
            "mistral3",
            {"image_embeds": torch.zeros(1, 64), "image_sizes": torch.tensor([[0, 28]])},
            InvalidTypeError,
            "image_sizes",
        ),
        ("mistral3", make_image(2000, 3), InvalidRequestError, "0x112 would be left"),
        ("llava_next", "picture.png", InvalidTypeError, "Invalid image type: got str"),
        ("llava_next", torch.zeros(4, 63), InvalidRequestError, r"shape \(4, 63\)"),
    ],
)
def test_what_gives_no_tokens_is_refused(family: str, data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prepare(config_of(family), "[IMG]" if family == "mistral3" else "<image>", {"image": data})


def test_settings_of_a_request_count_for_tokens_and_tensors() -> None:
    picture = {"image": [make_image(110, 100)]}
    for family, placeholder, settings in (
        ("internvl", "<IMG_CONTEXT>", {"max_patches": 1}),
        ("internvl", "<IMG_CONTEXT>", {"crop_to_patches": False}),
        ("idefics3", "<image>", {"do_image_splitting": False}),
        ("idefics3", "<image>", {"size": {"longest_edge": 56}}),
        ("mistral3", "[IMG]", {"size": {"longest_edge": 56}}),
    ):
        usual = prepare(config_of(family), placeholder, picture)
        other = prepare(config_of(family), placeholder, picture, **settings)
        assert len(other.token_ids) < len(usual.token_ids)
        assert other.kwargs["pixel_bytes"].numel() < usual.kwargs["pixel_bytes"].numel()


def test_a_request_cannot_ask_for_any_number_of_tiles() -> None:
    """All grids of so many tiles were tried, and their pixels allocated."""
    with pytest.raises(InvalidRequestError, match="max_patches"):
        prepare(config_of("internvl"), "<IMG_CONTEXT>", {"image": [make_image()]}, max_patches=10**6)
    with pytest.raises(InvalidRequestError, match=r"too long|pixels would become"):
        prepare(config_of("idefics3"), "<image>", {"image": [make_image()]}, size={"longest_edge": 10**6})
    with pytest.raises(InvalidRequestError, match="pixels would become"):
        prepare(config_of("mistral3"), "[IMG]", {"image": [Image.new("L", (9000, 9000))]}, size={"longest_edge": 10**6})


# Tiles


def test_the_best_resolution_keeps_most_and_wastes_least() -> None:
    resolutions = ((56, 112), (112, 56), (112, 112))
    assert best_resolution((50, 100), resolutions) == (56, 112)
    assert best_resolution((100, 50), resolutions) == (112, 56)
    assert best_resolution((300, 300), resolutions) == (112, 112)


def test_bars_are_at_two_opposite_edges() -> None:
    assert bars((50, 100), (10, 10)) == (2, 0)  # 5 of 10 rows: the picture keeps one of an odd number more
    assert unpadded((50, 100), (10, 10)) == (6, 10)
    assert unpadded((100, 25), (8, 8)) == (8, 2)


# Bytes


@pytest.mark.parametrize("family", PICTURES)
def test_bytes_and_a_table_are_the_processors_numbers(family: str) -> None:
    processor = pictures_of(family).processor
    assert picture_table(processor) is not None
    for size in SIZES_OF.get(family, SIZES):
        picture = make_image(size[1], size[0], seed=3)
        mapped = map_pictures(processor, [picture])
        expected = processor.preprocess(picture, return_tensors="pt")["pixel_values"]
        assert torch.equal(as_processed(mapped, 1)["pixel_values"], expected), size
        assert mapped["pixel_bytes"].nbytes * 4 == expected.nbytes


def test_a_processor_that_looks_at_more_than_a_byte_keeps_its_own_numbers() -> None:
    base = pictures_of("llava_next").processor

    class Fades(type(base)):  # type: ignore[misc]
        def normalize(self, image: Any, *args: Any, **kwargs: Any) -> Any:
            return super().normalize(image, *args, **kwargs) * torch.linspace(1, 2, image.shape[-1]).numpy()

    processor = Fades.from_dict(base.to_dict())
    assert picture_table(processor) is None
    assert set(map_pictures(processor, [make_image()])) == {"pixel_values", "image_sizes"}
