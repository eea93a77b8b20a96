"""The functions in V0's modules of towers with a fixed picture size: sizes, dummy data, and an input processor.

The modules define their names, and how many rows a picture has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from sensorium.inputs import token_inputs
from sensorium.multimodal.utils import (
    cached_get_tokenizer,
    consecutive_placeholder_ranges,
    repeat_and_pad_placeholder_tokens,
)
from sensorium.sequence import SequenceData


def patch_grid_length(*, image_size: int, patch_size: int) -> int:
    """Patches along a side."""
    assert image_size % patch_size == 0, f"pictures of {image_size} pixels have no whole patches of {patch_size}"
    return image_size // patch_size


def num_patches(*, image_size: int, patch_size: int) -> int:
    """Patches of a picture."""
    return patch_grid_length(image_size=image_size, patch_size=patch_size) ** 2


class DummySequence(SequenceData):
    """A prompt of dummy pictures. Files since 0.6.4 unpack it into the prompt and the ranges of the placeholders;
    earlier files use it as it is."""

    ranges: Mapping[str, Any]

    def __iter__(self) -> Iterator[Any]:
        yield self
        yield self.ranges


def dummy_sequence(num_rows: int, seq_len: int, num_images: int, image_token_id: int, mm_key: str) -> DummySequence:
    """A prompt of `num_images` pictures with `num_rows` placeholders each, filled up with token 0."""
    num_media = num_rows * num_images
    sequence = DummySequence.from_prompt_token_counts((image_token_id, num_media), (0, seq_len - num_media))
    assert isinstance(sequence, DummySequence)
    sequence.ranges = {mm_key: consecutive_placeholder_ranges(num_items=num_images, item_size=num_rows)}
    return sequence


def sequence_factory(num_rows_of: Callable[[Any], int]) -> Callable[..., DummySequence]:
    """`dummy_seq_data_for_...` of a tower, given how many rows a picture has."""

    def dummy_seq_data(
        hf_config: Any,
        seq_len: int,
        num_images: int,
        *,
        image_token_id: int,
        image_feature_size_override: int | None = None,
        mm_key: str = "image",
    ) -> DummySequence:
        """A prompt of dummy pictures; see `DummySequence`."""
        num_rows = num_rows_of(hf_config) if image_feature_size_override is None else image_feature_size_override
        return dummy_sequence(num_rows, seq_len, num_images, image_token_id, mm_key)

    return dummy_seq_data


def dummy_image(
    hf_config: Any,
    num_images: int,
    *,
    image_width_override: int | None = None,
    image_height_override: int | None = None,
) -> dict[str, Any]:
    """Black pictures of the tower's size, or of another one: one, or a list."""
    size = (image_width_override or hf_config.image_size, image_height_override or hf_config.image_size)
    image = Image.new("RGB", size)
    return {"image": image if num_images == 1 else [image] * num_images}


def dummy_video(
    hf_config: Any,
    num_frames: int,
    num_videos: int = 1,
    *,
    image_width_override: int | None = None,
    image_height_override: int | None = None,
) -> dict[str, Any]:
    """A list of black videos `(frames, height, width, 3)`."""
    width, height = image_width_override or hf_config.image_size, image_height_override or hf_config.image_size
    return {"video": [np.zeros((num_frames, height, width, 3), dtype=np.uint8)] * num_videos}


def processor_factory(num_rows_of: Callable[[Any], int]) -> Callable[..., Any]:
    """`input_processor_for_...` of a tower, given how many rows a picture has."""

    def input_processor(
        model_config: Any,
        hf_config: Any,
        inputs: Any,
        *,
        image_token_id: int,
        image_feature_size_override: int | list[int] | None = None,
    ) -> Any:
        """The inputs with as many placeholders for each picture as it has rows."""
        media = inputs.get("multi_modal_data")
        if media is None or "image" not in media or "image" in (inputs.get("multi_modal_placeholders") or {}):
            return inputs
        images, num_rows = media["image"], image_feature_size_override
        if num_rows is None:
            num_rows = images.shape[1] if hasattr(images, "shape") else num_rows_of(hf_config)
        if isinstance(num_rows, int):
            is_several = isinstance(images, list) or hasattr(images, "shape")
            num_rows = [num_rows] * (len(images) if is_several else 1)
        prompt, token_ids, ranges = repeat_and_pad_placeholder_tokens(
            cached_get_tokenizer(model_config.tokenizer),
            inputs.get("prompt"),
            inputs["prompt_token_ids"],
            placeholder_token_id=image_token_id,
            repeat_count=num_rows,
        )
        return token_inputs(
            prompt_token_ids=token_ids,
            prompt=prompt,
            multi_modal_data=media,
            multi_modal_placeholders={"image": ranges},
        )

    return input_processor
