"""Requests to the native models, with the processors of their checkpoints: token ids equal Hugging Face's."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from sensorium.errors import InvalidRequestError, MediaError
from sensorium.media import EncodedMedia, FetchPolicy, MediaLoader
from sensorium.multimodal.byte_patches import as_processed
from sensorium.multimodal.mrope import get_mrope_positions
from tests.helpers.checkpoints import HIDDEN_SIZE, token_ids
from tests.helpers.processors import make_image, make_video
from tests.inputs.front import front_of, hf_processor, keys_of, spans_of

LLAVA_ROWS = 16


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    make_image(90, 70, seed=4).save(path)
    return path


def test_llava_ids_and_pixels_equal_hugging_face() -> None:
    images = [make_image(60, 40, seed=1), make_image(30, 80, seed=2)]
    text = "<|im_start|>user\n<image>\n<image>What?<|im_end|>\n"
    request = front_of("llava").images(*images, text=text).engine_request
    reference = hf_processor("llava")(text=text, images=images, return_tensors="pt")
    assert list(request.prompt_token_ids) == reference["input_ids"][0].tolist()
    pixels = torch.cat([item.kwargs["pixel_values"] for item in request.media if item.kwargs])
    assert torch.equal(pixels, reference["pixel_values"])
    assert [item.span.length for item in request.media] == [LLAVA_ROWS] * 2


def test_qwen2_vl_ids_patches_and_positions_equal_hugging_face() -> None:
    front = front_of("qwen2_vl")
    images = [make_image(120, 60, seed=1), make_image(60, 140, seed=2)]
    video = make_video(5, 56, 84)
    item = "<|vision_start|><|{}_pad|><|vision_end|>"
    text = f"a{item.format('image')}b{item.format('video')}{item.format('image')}c"
    processed = front({"prompt": text, "multi_modal_data": {"image": images, "video": [video]}})
    request = processed.engine_request
    reference = hf_processor("qwen2_vl")(text=text, images=images, videos=[video], return_tensors="pt")
    assert list(request.prompt_token_ids) == reference["input_ids"][0].tolist()
    kwargs = [as_processed(item.kwargs, 2) for item in request.media if item.modality == "image" and item.kwargs]
    assert torch.equal(torch.cat([each["pixel_values"] for each in kwargs]), reference["pixel_values"])
    positions, delta = get_mrope_positions(
        list(request.prompt_token_ids),
        hf_config=front.config.model_config.hf_config,
        image_grid_thw=reference["image_grid_thw"],
        video_grid_thw=reference["video_grid_thw"],
    )
    assert request.mrope_positions is not None
    np.testing.assert_array_equal(request.mrope_positions, positions)
    assert request.mrope_delta == delta < 0


def test_text_alone_has_text_positions() -> None:
    request = front_of("qwen2_vl")("abc").engine_request
    assert request.mrope_positions is not None
    assert request.mrope_positions.tolist() == [[0, 1, 2]] * 3
    assert request.mrope_delta == 0


def test_one_tensor_may_hold_the_embeddings_of_several_images() -> None:
    embeddings = torch.randn(2, LLAVA_ROWS, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0))
    front = front_of("llava")
    prompt = {"prompt": "<image><image>", "multi_modal_data": {"image": embeddings}}
    assert spans_of(front(prompt)) == [(0, LLAVA_ROWS), (LLAVA_ROWS, LLAVA_ROWS)]
    too_many = {**prompt, "multi_modal_data": {"image": embeddings[:1].expand(9, -1, -1)}}
    with pytest.raises(InvalidRequestError, match=r"At most 8 image\(s\) may be provided"):
        front(too_many)


def test_qwen2_vl_takes_embeddings_with_their_grid() -> None:
    front = front_of("qwen2_vl")
    item = {"image_embeds": torch.ones(6, HIDDEN_SIZE), "image_grid_thw": torch.tensor([[1, 4, 6]])}
    processed = front({"prompt": "a<|image_pad|>", "multi_modal_data": {"image": item}})
    assert spans_of(processed) == [(1, 6)]
    item["image_embeds"] = torch.full((6, HIDDEN_SIZE), float("nan"))
    with pytest.raises(InvalidRequestError, match="NaN"):
        front({"prompt": "a<|image_pad|>", "multi_modal_data": {"image": item}})


@pytest.mark.parametrize("text", ["", "<image><image>"])
def test_placeholders_and_images_must_agree(text: str) -> None:
    with pytest.raises(InvalidRequestError):
        front_of("llava").images(make_image(), text="a" + text)


def test_a_typed_placeholder_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="where no media stands"):
        front_of("llava")("a<image>b")
    with pytest.raises(InvalidRequestError, match="where no media stands"):
        front_of("qwen2_vl")({"prompt_token_ids": [token_ids()["<|video_pad|>"]]})


# Encoded media


def test_paths_bytes_and_encoded_media_are_one_item(image_file: Path) -> None:
    loader = MediaLoader(policy=FetchPolicy(allow_any_local_path=True))
    front = front_of("llava", media_loader=loader)
    data = image_file.read_bytes()
    sources = [image_file, str(image_file), data, EncodedMedia("image", data)]
    processed = [front.images(source, text="<image>") for source in sources]
    assert len({tuple(keys_of(each)) for each in processed}) == 1
    assert front.preprocessor.statistics().misses == 1
    assert loader.cache.stats().misses == 1


def test_a_name_replaces_the_bytes_of_encoded_media(image_file: Path) -> None:
    front = front_of("llava", media_loader=MediaLoader(policy=FetchPolicy(allow_any_local_path=True)))
    named, plain = (
        front.images(image_file, text="<image>", multi_modal_uuids={"image": [uuid]}) for uuid in ("cat", None)
    )
    other = front.images(make_image(50, 50), text="<image>", multi_modal_uuids={"image": ["cat"]})
    assert keys_of(named) == keys_of(other) != keys_of(plain)


def test_an_encoded_image_maps_as_the_decoded_one(image_file: Path) -> None:
    front = front_of("llava", media_loader=MediaLoader(policy=FetchPolicy(allow_any_local_path=True)))
    encoded = front.images(image_file, text="<image>").engine_request.media[0]
    decoded = front.images(make_image(90, 70, seed=4), text="<image>").engine_request.media[0]
    assert encoded.kwargs is not None
    assert decoded.kwargs is not None
    assert torch.equal(encoded.kwargs["pixel_values"], decoded.kwargs["pixel_values"])
    assert encoded.key != decoded.key


def test_encoded_media_under_another_name_are_refused() -> None:
    with pytest.raises(MediaError, match="got encoded audio, expected image"):
        front_of("llava").images(EncodedMedia("audio", b"RIFF"), text="<image>")


def test_a_file_cut_short_is_the_request_s_error() -> None:
    from PIL import Image

    buffer = io.BytesIO()
    make_image(90, 70).save(buffer, "JPEG")
    image = Image.open(io.BytesIO(buffer.getvalue()[:-600]))
    with pytest.raises(MediaError):
        front_of("llava").images(image, text="<image>")
