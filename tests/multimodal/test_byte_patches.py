"""Pictures as bytes give the numbers of Hugging Face's processor, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sensorium.multimodal.byte_patches import as_processed, map_pictures, pixel_table
from sensorium.multimodal.image import cached_get_image_processor
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.hf_reference import TEMPORAL_PATCH_SIZE


def processor(**settings: Any) -> Any:
    return cached_get_image_processor(str(make_checkpoint("qwen2_vl")), **settings)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"image_mean": [0.1, 0.5, 0.9], "image_std": [0.2, 0.3, 0.4]},
        {"do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5},
        {"resample": 2},
        {"size": {"shortest_edge": 4000, "longest_edge": 9000}},
    ],
    ids=str,
)
def test_bytes_and_a_table_are_the_processors_numbers(settings: dict[str, Any]) -> None:
    one = processor(**settings)
    table = pixel_table(one)
    assert table is not None
    pictures = [picture(60, 44), picture(28, 28, 1), picture(201, 33, 2)]
    expected = one.preprocess(pictures, return_tensors="pt")
    mapped = as_processed(map_pictures(one, pictures, table), TEMPORAL_PATCH_SIZE)
    assert torch.equal(mapped["pixel_values"], expected["pixel_values"])
    assert torch.equal(mapped["image_grid_thw"], expected["image_grid_thw"])


def test_a_processor_that_looks_at_more_than_a_byte_keeps_its_own_numbers() -> None:
    """A subclass may sharpen, say, or depend on a pixel's place: bytes alone don't tell, and the trial shows it."""

    class Sharpens(type(processor())):  # type: ignore[misc]
        def normalize(self, image: Any, *args: Any, **kwargs: Any) -> Any:
            return super().normalize(image, *args, **kwargs) * np.linspace(1, 2, image.shape[-1], dtype=np.float32)

    assert pixel_table(Sharpens.from_dict(processor().to_dict())) is None
    assert pixel_table(object()) is None


def test_pictures_take_an_eighth_of_the_memory_of_numbers() -> None:
    one = processor()
    table = pixel_table(one)
    assert table is not None
    mapped = map_pictures(one, [picture(280, 280)], table)
    numbers = one.preprocess(picture(280, 280), return_tensors="pt")["pixel_values"]
    assert mapped["pixel_bytes"].nbytes * 8 == numbers.nbytes
