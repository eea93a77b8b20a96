"""The number of rows of an image or video in Qwen2-VL and related models, and the largest size.

Source: Wang et al. 2024, "Qwen2-VL", section 2.1 (naive dynamic resolution); `transformers`
`Qwen2VLProcessor`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image

from sensorium.errors import InvalidRequestError, InvalidTypeError
from sensorium.inputs import InputContext
from sensorium.model_executor.layers.tower import Grid
from sensorium.model_executor.models.media_common import check_embeddings, stacked
from sensorium.multimodal.image import cached_get_image_processor
from sensorium.multimodal.smart_resize import smart_resize
from sensorium.multimodal.video import cached_get_video_processor

MAX_ASPECT_RATIO = 200
Item: TypeAlias = Any
"""A picture, a clip `(frames, height, width, 3)`, or a dict with `<modality>_embeds` and `<modality>_grid_thw`."""


class VisionInputs:
    """The sizes of one modality's items, in rows and pixels.

    Args:
        ctx: The model's context.
        modality: "image" or "video".
        settings: The processor's settings from a request or the engine; None stands for one that isn't set.
    """

    def __init__(self, ctx: InputContext, modality: str, **settings: Any) -> None:
        self.modality = modality
        self.config = ctx.get_hf_config()
        self.merge_size: int = self.config.vision_config.spatial_merge_size
        self.token_id: int = getattr(self.config, f"{modality}_token_id")
        self.embeds, self.grid_thw = f"{modality}_embeds", f"{modality}_grid_thw"
        load = cached_get_image_processor if modality == "image" else cached_get_video_processor
        self.processor = load(
            ctx.model_config.model,
            trust_remote_code=ctx.model_config.trust_remote_code,
            revision=ctx.model_config.revision,
            **{name: value for name, value in settings.items() if value is not None},
        )
        # The most rows of any prompt; one token of the model's length is for the output.
        self.max_rows = ctx.model_config.max_model_len - 1

    def grids(self, item: Item) -> list[Grid]:
        """The grid of patches of an item. A dict of embeddings may have several pictures or clips, and so several
        grids.

        Raises:
            InvalidTypeError: It isn't an item.
            InvalidRequestError: Embeddings don't fit their grids.
        """
        if isinstance(item, Mapping):
            return self._given_grids(item)
        if self.modality == "image" and isinstance(item, Image.Image):
            return [self.grid_of_size(1, item.height, item.width)]
        if self.modality == "video" and isinstance(item, np.ndarray) and item.ndim == 4:
            return [self.grid_of_size(*item.shape[:3])]
        raise InvalidTypeError(
            f"Invalid {self.modality} type: got {type(item).__name__}, expected a PIL image, an array of frames "
            f"(frames, height, width, 3), or a dict with {self.embeds} and {self.grid_thw}."
        )

    def _given_grids(self, item: Mapping[str, Any]) -> list[Grid]:
        grid_thw = item.get(self.grid_thw)
        if not isinstance(grid_thw, torch.Tensor) or not grid_thw.numel() or grid_thw.shape[-1] != 3:
            raise InvalidTypeError(
                f"{self.modality} given as a dict: got the keys {sorted(item)}, expected tensors {self.embeds} (rows, "
                f"hidden_size) and {self.grid_thw} (items, 3). Pass both."
            )
        grids = grids_of(grid_thw)
        num_rows, width = sum(map(self.num_rows, grids)), self.config.get_text_config().hidden_size
        check_embeddings(item.get(self.embeds), num_rows, width, self.embeds)
        return grids

    def grid_of_size(self, num_frames: int, height: int, width: int) -> Grid:
        """The grid of a picture (one frame) or a clip of this size in pixels."""
        processor = self.processor
        patch, depth = processor.patch_size, processor.temporal_patch_size
        if processor.do_resize and self.modality == "image":
            bounds = processor.size["shortest_edge"], processor.size["longest_edge"]
            height, width = smart_resize(height, width, patch * processor.merge_size, *bounds)
        elif processor.do_resize:
            height, width = processor.new_size(num_frames, height, width)
        return -(-num_frames // depth), height // patch, width // patch

    def num_rows(self, grid: Grid) -> int:
        """Decoder rows of an item.

        Raises:
            InvalidRequestError: A grid from a request is invalid.
        """
        t, h, w = grid
        if min(grid) < 1 or h % self.merge_size or w % self.merge_size:
            raise InvalidRequestError(
                f"got {grid}, expected positive numbers, height and width multiples of "
                f"{self.merge_size}. Pass the grid that the processor returned.",
                field=self.grid_thw,
            )
        return t * h * w // self.merge_size**2

    def largest(self, max_rows: int) -> Item:
        """A blank picture or clip of the largest size."""
        num_frames, height, width = self.largest_size(max_rows)
        if self.modality == "image":
            return Image.new("RGB", (width, height))
        return np.zeros((num_frames, height, width, 3), dtype=np.uint8)

    def largest_size(self, max_rows: int) -> tuple[int, int, int]:
        """Frames (1 for a picture), height and width in pixels of the item with the most rows.

        It has at most `max_rows`, unless even the smallest legal item has more.
        """
        factor = self.processor.patch_size * self.processor.merge_size
        if self.modality == "video" and self.processor.counts_whole_clip:
            # A frame has at least one row, so that long clips may exceed the bound on a clip's pixels.
            return max(max_rows, 1) * self.processor.temporal_patch_size, factor, factor
        fewest = math.ceil(self.processor.size["shortest_edge"] / factor**2)
        most = max(self.processor.size["longest_edge"] // factor**2, 1)
        num_steps = 1
        if self.modality == "video":
            num_steps = max(min(math.ceil(max_rows / most), max_rows // max(fewest, 1)), 1)
        height, width = self._largest_frame(max(max_rows // num_steps, fewest), most)
        depth = 1 if self.modality == "image" else self.processor.temporal_patch_size
        return num_steps * depth, height * factor, width * factor

    def _largest_frame(self, max_rows: int, most: int) -> tuple[int, int]:
        """Height and width, in merged squares, of the frame with the most squares after resizing."""
        factor = self.processor.patch_size * self.processor.merge_size
        # Shrinking keeps the height of a strip at one square at least, so a strip may exceed a small `most`.
        shapes = [squares_of(min(max_rows, most)), *((1, width) for width in range(most + 1, MAX_ASPECT_RATIO + 1))]
        rows = {shape: self.num_rows(self.grid_of_size(1, shape[0] * factor, shape[1] * factor)) for shape in shapes}
        return max((shape for shape in shapes if rows[shape] <= max_rows), key=rows.__getitem__, default=shapes[0])


def squares_of(num_squares: int) -> tuple[int, int]:
    """Height and width of the largest legal rectangle of at most `num_squares`, as close to a square as possible."""
    for area in range(num_squares, 0, -1):
        for height in range(math.isqrt(area), 0, -1):
            if area % height == 0 and area // height <= MAX_ASPECT_RATIO * height:
                return height, area // height
    raise AssertionError("an area of 1 is always found")


def grids_of(grid_thw: Any) -> list[Grid]:
    """Grids as tuples, from a tensor `(..., 3)`, nested lists of such tensors, or `None`."""
    return [] if grid_thw is None else [(t, h, w) for t, h, w in stacked(grid_thw, 1).tolist()]
