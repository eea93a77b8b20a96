"""Pictures: their plugin, and helpers on sizes that model files call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sensorium.errors import InvalidTypeError, ProcessorError, SensoriumError
from sensorium.multimodal.base import MultiModalPlugin
from sensorium.multimodal.context import InputContext
from sensorium.multimodal.hf_processors import (
    cached_get_image_processor,
    processor_options,
    processor_settings,
    resolve_backend,
)
from sensorium.multimodal.inputs import MultiModalKwargs
from sensorium.multimodal.resize_limits import check_picture
from sensorium.multimodal.smart_resize import smart_resize
from sensorium.multimodal.utils import is_list_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from sensorium.config import ModelConfig

__all__ = ["ImagePlugin", "cached_get_image_processor", "rescale_image_size", "smart_resize"]

DEFAULT_MAX_IMAGE_TOKENS = 3000
"""Rows of one image, for a class that doesn't say: above those of most models."""


class ImagePlugin(MultiModalPlugin):
    """Images: PIL pictures go through the checkpoint's image processor, tensors are embeddings."""

    def get_data_key(self) -> str:
        """See `MultiModalPlugin`."""
        return "image"

    def _default_input_mapper(self, ctx: InputContext, data: Any, **mm_processor_kwargs: Any) -> MultiModalKwargs:
        """Map a picture or a list of them, or embeddings.

        Pictures give what the image processor's `preprocess` returns (mostly `pixel_values`, `(num_images, 3, height,
        width)`); a tensor or a list of tensors gives `image_embeds` as it is; a `BatchFeature` passes through.

        Raises `InvalidTypeError` (a `TypeError`) for anything else, `InvalidRequestError` (a `ValueError`) if the
        picture would become too large, `ProcessorError` (a `RuntimeError`) if the checkpoint has no image processor or
        it fails.
        """
        import torch
        from PIL.Image import Image

        if isinstance(data, Image) or is_list_of(data, Image, check="all"):
            settings = processor_settings(mm_processor_kwargs) | processor_options(ctx.model_config)
            processor = cached_get_image_processor(ctx.model_config.model, **settings)
            for image in data if isinstance(data, list) else [data]:
                check_picture(processor, image.height, image.width)
            return preprocess(processor, data)
        if isinstance(data, torch.Tensor) or is_list_of(data, torch.Tensor, check="all"):
            return MultiModalKwargs({"image_embeds": data})
        if isinstance(data, Mapping) and ("pixel_values" in data or "image_embeds" in data):
            return MultiModalKwargs(data)
        raise InvalidTypeError(
            f"Invalid image type: got {type_name(data)}, expected a PIL image or a list of them, or a tensor of "
            f"embeddings. Convert the image first."
        )

    def _default_max_multimodal_tokens(self, ctx: InputContext) -> int:
        return DEFAULT_MAX_IMAGE_TOKENS

    def _check_default_mapper(self, model_config: ModelConfig) -> None:
        resolve_backend(model_config.model, model_config.revision, model_config.mm_processor_backend)


def preprocess(processor: Any, data: Any) -> MultiModalKwargs:
    """Call a Hugging Face processor's `preprocess`; a failure is the request's, as `ProcessorError`."""
    try:
        return MultiModalKwargs(processor.preprocess(data, return_tensors="pt").data)
    except SensoriumError:
        raise
    except Exception as exc:
        raise ProcessorError(f"{type(processor).__name__} can't process this input: {type(exc).__name__}.") from exc


def type_name(data: object) -> str:
    """The type of media data for an error message; of a list, also its members' types."""
    if isinstance(data, list | tuple):
        return f"{type(data).__name__} of {', '.join(sorted({type(item).__name__ for item in data})) or 'nothing'}"
    return type(data).__name__


def rescale_image_size(image: Image, size_factor: float, transpose: int = -1) -> Image:
    """The image with both sides multiplied by `size_factor`, and transposed by a `PIL.Image.Transpose` if >= 0."""
    from PIL.Image import Transpose

    resized = image.resize((int(image.width * size_factor), int(image.height * size_factor)))
    return resized.transpose(Transpose(transpose)) if transpose >= 0 else resized
