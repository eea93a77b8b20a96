"""Qwen2-VL: a tower for images and videos of any size, and Qwen2 with M-RoPE.

Paper: Wang et al. 2024, "Qwen2-VL: Enhancing Vision-Language Model's Perception of the World at Any
Resolution". Reference: `transformers` `Qwen2VLForConditionalGeneration`.
Placeholders: an item's `<|image_pad|>` or `<|video_pad|>` becomes `t * h * w / merge_size^2` of them, where
(t, h, w) is its grid of patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import nn

from sensorium.config import EngineConfig
from sensorium.errors import InvalidTypeError
from sensorium.inputs import INPUT_REGISTRY, DummyData, InputContext, TokenInputs
from sensorium.model_executor.models.media_common import (
    as_items,
    expand_placeholders,
    language_config,
    stacked,
)
from sensorium.model_executor.models.media_language_model import MediaLanguageModel
from sensorium.model_executor.models.qwen2 import Qwen2ForCausalLM
from sensorium.model_executor.models.qwen2_vision import Qwen2VisionTransformer
from sensorium.model_executor.models.qwen_vl_inputs import Item, VisionInputs, grids_of
from sensorium.model_executor.models.utils import WeightsMapper, maybe_prefix
from sensorium.multimodal import MULTIMODAL_REGISTRY, MultiModalKwargs
from sensorium.multimodal.byte_patches import all_normalised, map_pictures, pixel_table
from sensorium.multimodal.image import preprocess
from sensorium.multimodal.mrope import positions_from_kwargs
from sensorium.sequence import SequenceData


def input_processor(
    ctx: InputContext,
    inputs: TokenInputs,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> TokenInputs:
    """Expand each item's placeholder to the number of rows that follows from its size."""
    data = inputs.get("multi_modal_data") or {}
    kinds = [
        VisionInputs(ctx, modality, min_pixels=min_pixels, max_pixels=max_pixels)
        for modality in ("image", "video")
        if modality in data
    ]
    if not kinds:
        return inputs
    grids = {kind.token_id: [kind.grids(item) for item in as_items(data[kind.modality])] for kind in kinds}
    counts = {kind.token_id: [kind.num_rows(grid) for each in grids[kind.token_id] for grid in each] for kind in kinds}
    names = {kind.token_id: kind.modality for kind in kinds}
    token_ids, ranges = expand_placeholders(inputs["prompt_token_ids"], counts, names, ctx.model_config.max_model_len)
    inputs["prompt_token_ids"] = token_ids
    # A dict with several grids is one item with several ranges, which are found by their tokens.
    inputs["multi_modal_placeholders"] = {
        names[token_id]: ranges[token_id] for token_id in counts if all(len(each) == 1 for each in grids[token_id])
    }
    return inputs


def map_images(
    ctx: InputContext,
    data: Item | list[Item],
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> MultiModalKwargs:
    """The tower's arguments for pictures, with `image_grid_thw` `(images, 3)`.

    They are `pixel_bytes` and `pixel_table` (see `byte_patches`), or `pixel_values`
    `(patches, channels * patch volume)` for a processor that `byte_patches` doesn't support, or `image_embeds`.
    """
    kind = VisionInputs(ctx, "image", min_pixels=min_pixels, max_pixels=max_pixels)
    table = pixel_table(kind.processor)
    pictures = as_items(data)
    if table is None or not all(isinstance(each, Image.Image) and each.mode == "RGB" for each in pictures):
        return _map(kind, data)
    return MultiModalKwargs(map_pictures(kind.processor, pictures, table))


def map_videos(
    ctx: InputContext,
    data: Item | list[Item],
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> MultiModalKwargs:
    """`pixel_values_videos` or `video_embeds`, with `video_grid_thw` `(videos, 3)`; as `map_images`."""
    return _map(VisionInputs(ctx, "video", min_pixels=min_pixels, max_pixels=max_pixels), data)


def _map(kind: VisionInputs, data: Item | list[Item]) -> MultiModalKwargs:
    items = as_items(data)
    if not any(isinstance(item, Mapping) for item in items):
        return preprocess(kind.processor, items)
    given = [item for item in items if isinstance(item, Mapping) and kind.grids(item)]
    if len(given) < len(items):
        raise InvalidTypeError(f"{kind.modality} data: got pictures beside given rows, expected one kind in a call.")
    return MultiModalKwargs(
        {name: torch.cat([stacked(item[name], 1) for item in given]) for name in (kind.embeds, kind.grid_thw)}
    )


def max_image_tokens(ctx: InputContext, *, min_pixels: int | None = None, max_pixels: int | None = None) -> int:
    """Rows of the largest picture that fits into the model's length."""
    kind = VisionInputs(ctx, "image", min_pixels=min_pixels, max_pixels=max_pixels)
    return kind.num_rows(kind.grid_of_size(*kind.largest_size(kind.max_rows)))


def max_video_tokens(ctx: InputContext, *, min_pixels: int | None = None, max_pixels: int | None = None) -> int:
    """Rows of the largest clip that fits into the model's length."""
    kind = VisionInputs(ctx, "video", min_pixels=min_pixels, max_pixels=max_pixels)
    return kind.num_rows(kind.grid_of_size(*kind.largest_size(kind.max_rows)))


def dummy_data(
    ctx: InputContext,
    seq_len: int,
    mm_counts: Mapping[str, int],
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> DummyData:
    """Items that share `seq_len` tokens evenly, each as large as possible, then zeros."""
    pieces, data = largest_items(ctx, seq_len, mm_counts, min_pixels=min_pixels, max_pixels=max_pixels)
    pieces.append((0, max(seq_len - sum(count for _, count in pieces), 0)))
    return DummyData(SequenceData.from_prompt_token_counts(*pieces), data or None)


def largest_items(
    ctx: InputContext, num_tokens: int, mm_counts: Mapping[str, int], **settings: int | None
) -> tuple[list[tuple[int, int]], dict[str, list[Item]]]:
    """Pictures and clips that share so many tokens evenly, each as large as possible: their tokens, run-length encoded
    with the marks around them, and the items by modality."""
    config = ctx.get_hf_config()
    data: dict[str, list[Item]] = {}
    pieces: list[tuple[int, int]] = []
    share = num_tokens // max(mm_counts["image"] + mm_counts["video"], 1) - 2
    for modality in ("image", "video"):
        if not mm_counts[modality]:
            continue
        kind = VisionInputs(ctx, modality, **settings)
        item = kind.largest(min(share, kind.max_rows))
        num_rows = kind.num_rows(*kind.grids(item))
        start, end = (config.vision_start_token_id, 1), (config.vision_end_token_id, 1)
        pieces += [start, (kind.token_id, num_rows), end] * mm_counts[modality]
        data[modality] = [item] * mm_counts[modality]
    return pieces, data


@MULTIMODAL_REGISTRY.register_image_input_mapper(map_images)
@MULTIMODAL_REGISTRY.register_input_mapper("video", map_videos)
@MULTIMODAL_REGISTRY.register_max_image_tokens(max_image_tokens)
@MULTIMODAL_REGISTRY.register_max_multimodal_tokens("video", max_video_tokens)
@MULTIMODAL_REGISTRY.register_placeholder_tokens("image", lambda ctx: ctx.get_hf_config().image_token_id)
@MULTIMODAL_REGISTRY.register_placeholder_tokens("video", lambda ctx: ctx.get_hf_config().video_token_id)
@MULTIMODAL_REGISTRY.register_placeholder_str("image", "<|vision_start|><|image_pad|><|vision_end|>")
@MULTIMODAL_REGISTRY.register_placeholder_str("video", "<|vision_start|><|video_pad|><|vision_end|>")
@INPUT_REGISTRY.register_dummy_data(dummy_data)
@INPUT_REGISTRY.register_input_processor(input_processor)
class Qwen2VLForConditionalGeneration(MediaLanguageModel):
    """Tower and decoder."""

    names = WeightsMapper(
        orig_to_new_prefix={
            "model.visual.": "visual.",
            "model.language_model.": "language_model.model.",
            "model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
        }
    )
    tower_class: ClassVar[type[Qwen2VisionTransformer]] = Qwen2VisionTransformer
    mm_host_kwargs: ClassVar[Sequence[str]] = ("image_grid_thw", "video_grid_thw")

    def __init__(self, *, config: EngineConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = config.model_config.hf_config
        self.visual = self.tower_class(
            self.config.vision_config, config.quant_config, prefix=maybe_prefix(prefix, "visual")
        )
        self.language_model = self.make_language_model(config, maybe_prefix(prefix, "language_model"))

    def make_language_model(self, config: EngineConfig, prefix: str) -> nn.Module:
        """The decoder, given the whole model's configuration."""
        return Qwen2ForCausalLM(config=language_config(config), prefix=prefix)

    @classmethod
    def get_mrope_input_positions(
        cls, input_tokens: Sequence[int], hf_config: Any, mm_kwargs: Mapping[str, Any]
    ) -> tuple[np.ndarray[Any, np.dtype[np.int64]], int]:
        """M-RoPE positions `(3, num_tokens)` of an expanded prompt, and the offset from indices to positions of later
        tokens."""
        return positions_from_kwargs(input_tokens, hf_config, mm_kwargs)

    def placeholder_token_ids(self) -> list[int]:
        """See `MediaLanguageModel`."""
        return [self.config.image_token_id, self.config.video_token_id]

    def encode_media(
        self,
        pixel_values: Any = None,
        image_embeds: Any = None,
        image_grid_thw: Any = None,
        pixel_values_videos: Any = None,
        video_embeds: Any = None,
        video_grid_thw: Any = None,
        pixel_bytes: Any = None,
        pixel_table: Any = None,
        **kwargs: Any,
    ) -> dict[int, Sequence[torch.Tensor]]:
        """See `MediaLanguageModel`; each modality as patches or embeddings, with the items' grids."""
        if pixel_bytes is not None:
            sizes = [t * h * w for t, h, w in grids_of(image_grid_thw)]
            num_frames = self.config.vision_config.temporal_patch_size
            pixel_values = all_normalised(stacked(pixel_bytes, 3), stacked(pixel_table, 2), sizes, num_frames)
        encoded: dict[int, Sequence[torch.Tensor]] = {}
        for token_id, patches, embeds, grid_thw in (
            (self.config.image_token_id, pixel_values, image_embeds, image_grid_thw),
            (self.config.video_token_id, pixel_values_videos, video_embeds, video_grid_thw),
        ):
            if grids := grids_of(grid_thw):
                rows = stacked(embeds, 1) if patches is None else self.visual(stacked(patches, 1), grids)
                encoded[token_id] = torch.split(rows, [t * h * w // self.visual.merge_size**2 for t, h, w in grids])
        return encoded
