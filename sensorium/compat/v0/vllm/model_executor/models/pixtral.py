"""Pixtral's vision tower, as transformers has it, with V0's constructor, and what V0 had beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from PIL import Image

from sensorium.compat.v0.tower_inputs import dummy_image, sequence_factory
from sensorium.errors import ModelError
from sensorium.inputs import token_inputs
from sensorium.model_executor.layers.quantization import QuantizationConfig
from sensorium.model_executor.models.pixtral import PixtralVisionModel
from sensorium.multimodal.hf_processors import cached_get_tokenizer, read_config_file

__all__ = [
    "PixtralHFVisionModel",
    "dummy_image_for_pixtral_hf",
    "dummy_seq_data_for_pixtral_hf",
    "get_max_pixtral_hf_image_feature_size",
    "get_max_pixtral_hf_image_tokens",
    "get_pixtral_hf_image_feature_size",
    "get_pixtral_hf_num_patches",
    "get_pixtral_hf_patch_grid_length",
    "input_processor_for_pixtral_hf",
]

T = TypeVar("T")

dummy_image_for_pixtral_hf = dummy_image


def get_pixtral_hf_patch_grid_length(*, image_size: int, patch_size: int) -> int:
    """Most patches along a side."""
    return image_size // patch_size


def get_pixtral_hf_num_patches(*, image_size: int, patch_size: int) -> int:
    """Most patches of a picture."""
    return get_pixtral_hf_patch_grid_length(image_size=image_size, patch_size=patch_size) ** 2


def get_max_pixtral_hf_image_feature_size(hf_config: Any) -> int:
    """Most rows of a picture: one for each patch."""
    return get_pixtral_hf_num_patches(image_size=hf_config.image_size, patch_size=hf_config.patch_size)


def get_max_pixtral_hf_image_tokens(hf_config: Any) -> int:
    """Most rows of a picture."""
    return get_max_pixtral_hf_image_feature_size(hf_config)


dummy_seq_data_for_pixtral_hf = sequence_factory(get_max_pixtral_hf_image_feature_size)


def get_pixtral_hf_image_feature_size(hf_config: Any, image_width: int, image_height: int) -> tuple[int, int]:
    """Columns and rows of patches of a picture. Source: `transformers` `PixtralImageProcessor`, which shrinks pictures
    to a longest edge and rounds up to whole patches."""
    ratio = max(image_width, image_height) / hf_config.image_size
    if ratio > 1:
        image_width, image_height = math.floor(image_width / ratio), math.floor(image_height / ratio)
    columns, rows = (-(-max(side, 1) // hf_config.patch_size) for side in (image_width, image_height))
    return columns, rows


def input_processor_for_pixtral_hf(
    model_config: Any,
    hf_config: Any,
    inputs: Any,
    *,
    image_token_id: int,
    image_feature_size_override: int | list[int] | None = None,
) -> Any:
    """The inputs with the tokens of each picture in the place of its placeholder: rows of patches, and breaks between.

    Raises `ValueError` unless there are as many pictures as placeholders, and `TypeError` for what isn't a picture.
    """
    media = inputs.get("multi_modal_data")
    if media is None or "image" not in media:
        return inputs
    images = media["image"] if isinstance(media["image"], list) else [media["image"]]
    if not all(isinstance(image, Image.Image) for image in images):
        raise TypeError(f"pictures of Pixtral: got {type(media['image']).__name__}, expected PIL images. Pass these.")
    tokenizer = cached_get_tokenizer(model_config.tokenizer)
    settings = read_config_file(model_config.model, "processor_config.json", model_config.revision)
    break_, end = (settings.get(f"image_{kind}_token", f"[IMG_{kind.upper()}]") for kind in ("break", "end"))
    break_id, end_id = tokenizer.convert_tokens_to_ids([break_, end])
    grids = [get_pixtral_hf_image_feature_size(hf_config, *image.size) for image in images]
    token_ids = _replaced(
        inputs["prompt_token_ids"],
        image_token_id,
        [_tokens(image_token_id, break_id, end_id, grid) for grid in grids],
    )
    prompt, row = inputs.get("prompt"), tokenizer.convert_ids_to_tokens(image_token_id)
    if prompt and prompt.count(row) == len(grids):
        first, *others = prompt.split(row)
        texts = ("".join(_tokens(row, break_, end, grid)) for grid in grids)
        prompt = first + "".join(text + other for text, other in zip(texts, others, strict=True))
    return token_inputs(prompt_token_ids=token_ids, prompt=prompt, multi_modal_data=media)


def _tokens(row: T, break_: T, end: T, grid: tuple[int, int]) -> list[T]:
    """The tokens of a picture of so many columns and rows."""
    columns, rows = grid
    return [*([*[row] * columns, break_] * rows)[:-1], end]


def _replaced(token_ids: Sequence[int], placeholder: int, pictures: Sequence[list[int]]) -> list[int]:
    """A prompt with the pictures' tokens in the place of placeholders."""
    if (count := list(token_ids).count(placeholder)) != len(pictures):
        raise ValueError(
            f"pictures of a prompt: got {len(pictures)} for {count} placeholders, expected one for each. Correct the "
            "prompt."
        )
    remaining = iter(pictures)
    return [each for token in token_ids for each in (next(remaining) if token == placeholder else [token])]


class PixtralHFVisionModel(PixtralVisionModel):
    """The tower, up to a layer. There is no norm behind it.

    Args:
        config: A Pixtral vision config.
        quant_config: How linear layers hold their weights.
        num_hidden_layers_override: How many layers; all by default.
        require_post_norm: False or None.
        prefix: The module's name in the model.

    Raises:
        ModelError: A norm is asked for.
    """

    def __init__(
        self,
        config: Any,
        quant_config: QuantizationConfig | None = None,
        *,
        num_hidden_layers_override: int | None = None,
        require_post_norm: bool | None = None,
        prefix: str = "",
    ) -> None:
        if require_post_norm:
            raise ModelError("require_post_norm of Pixtral's tower: got True, expected False: it has no such norm.")
        count = config.num_hidden_layers if num_hidden_layers_override is None else num_hidden_layers_override
        super().__init__(config, (count,), quant_config, prefix)
        self.config = config

    def forward(self, pixel_values: Any, *args: Any) -> torch.Tensor:
        """Pictures, each `(channels, height, width)`, to the rows of all of their patches, `(1, patches, width)`."""
        if args:
            return super().forward(pixel_values, *args)
        sizes = [image.shape[-2:] for image in pixel_values]
        return self.encode([image[None] for image in pixel_values], torch.tensor(sizes))[0][None]
