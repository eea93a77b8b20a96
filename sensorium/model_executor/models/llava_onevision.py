"""LLaVA-OneVision: LLaVA-NeXT with many resolutions and a bound on rows, several pictures in a prompt, and clips.

Paper: Li et al. 2024, "LLaVA-OneVision: Easy Visual Task Transfer", section 3.1. Reference: `transformers`
`LlavaOnevisionForConditionalGeneration`. Placeholders: `<image>` as in LLaVA-NeXT, with lines shrunk to the bound. If a
prompt has several pictures, each is one square tile and a row after it. `<video>` becomes a quarter of the rows of each
frame, and a row after the last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from sensorium.model_executor.models.llava import patches_per_side
from sensorium.model_executor.models.llava_next import LlavaNextForConditionalGeneration, LlavaNextPictures
from sensorium.model_executor.models.media_common import Pieces, length_of
from sensorium.model_executor.models.media_inputs import ClipInputs, Size, takes_media
from sensorium.model_executor.models.tiles import Pair
from sensorium.multimodal.byte_pictures import pictures_of
from sensorium.multimodal.inputs import each_item

SHRINKS_ABOVE = 1.1
"""The ratio of sides from which on lines are shrunk to the bound."""


def most_places(hf_config: Any) -> int:
    """The bound on rows times columns of lines."""
    return int(hf_config.vision_aspect_ratio.removeprefix("anyres_max_")) * patches_per_side(hf_config) ** 2


def within_bound(grid: Pair, most: int) -> Pair:
    """Rows and columns of a picture's lines, shrunk to the bound."""
    ratio = math.sqrt(grid[0] * grid[1] / most)
    return (int(grid[0] // ratio), int(grid[1] // ratio)) if ratio > SHRINKS_ABOVE else grid


class LlavaOnevisionPictures(LlavaNextPictures):
    """A single picture in a prompt is split into tiles; several are not."""

    settings = ("one_tile",)
    """`one_tile`: whether pictures are squares of one tile each; by default, if a prompt has several."""

    @property
    def has_one_tile(self) -> bool:
        """Whether pictures aren't split into tiles."""
        return bool(self.given.get("one_tile"))

    def prepare(self, num_items: int) -> Mapping[str, Any]:
        """See `MediaInputs`."""
        self.given.setdefault("one_tile", num_items > 1)
        return {"one_tile": self.has_one_tile}

    def processor_settings(self) -> dict[str, Any]:
        """Without splitting, only the whole picture."""
        side = self.config.vision_config.image_size
        return {"image_grid_pinpoints": [[side, side]]} if self.has_one_tile else {}

    def lines(self, size: Pair) -> Pair:
        """See `LlavaNextPictures`."""
        return (1, 0) if self.has_one_tile else within_bound(super().lines(size), most_places(self.config))

    def largest(self, max_tokens: int) -> Size:
        """See `MediaInputs`: pictures that don't fill their tiles may have more rows, since lines slightly above the
        bound aren't shrunk."""
        sizes = sorted(self._filled_tiles(), reverse=True)
        fitting = [(count, size) for count, size in sizes if count <= max_tokens]
        for count, size in fitting:
            if length_of(self.pieces_of_size(size)) == count:  # it is split into just these tiles
                return size
        return sizes[-1][1]

    def _filled_tiles(self) -> Iterator[tuple[int, Size]]:
        """Numbers of tokens and sizes of pictures that fill the tiles of a resolution in one direction at least."""
        side, most, tile = patches_per_side(self.config), most_places(self.config), self.config.vision_config.image_size
        for height, width in super().sizes():
            down, across = height // tile * side, width // tile * side
            for less in range(0, 2 * side, 2):
                for lines in ((down - less, across), (down, across - less)):
                    if min(lines) > 0:
                        rows, columns = within_bound(lines, most)
                        size = (height * lines[0] // down, width * lines[1] // across)
                        yield side**2 + rows * (columns + 1), size

    def map(self, items: Sequence[Any]) -> Mapping[str, Any]:
        """See `PictureInputs`; with `batch_num_images`, which tells Hugging Face's model whether pictures are split."""
        pictures = [self.one_tile(each) for each in items] if self.has_one_tile else items
        mapped = dict(super().map(pictures))
        if self.has_one_tile:
            for name in ("pixel_values", "pixel_bytes"):
                if name in mapped:
                    mapped[name] = _first_tiles(mapped[name])
            mapped["image_sizes"] = torch.tensor([(each.height, each.width) for each in items])
        return mapped | {"batch_num_images": torch.full((len(items),), 2 if self.has_one_tile else 1)}

    def one_tile(self, picture: Image.Image) -> Image.Image:
        """A picture centered in a square of the processor's mean colour."""
        self.size_of(picture)
        height, width = picture.height, picture.width
        if height == width:
            return picture
        side = max(height, width)
        colour = tuple(int(mean * 255) for mean in self.processor.image_mean)
        square = Image.new("RGB", (side, side), colour)
        square.paste(picture.convert("RGB"), ((side - width) // 2, (side - height) // 2))
        return square


def _first_tiles(pixels: Any) -> Any:
    """The first tile, which is the whole picture, `(1, 1, channels, height, width)`."""
    return [each[:, :1] for each in pixels] if isinstance(pixels, list) else pixels[:, :1]


class LlavaOnevisionClips(ClipInputs):
    """Frames of the tower's size, pooled to half of their rows and columns."""

    def pieces_of_size(self, size: Size) -> Pieces:
        """See `MediaInputs`."""
        return self.pieces_of_rows(size[0] * math.ceil(patches_per_side(self.config) / 2) ** 2 + 1)

    def pieces_of_rows(self, num_rows: int) -> Pieces:
        """See `MediaInputs`."""
        return ((self.row_id, num_rows),)


@takes_media(LlavaOnevisionPictures, LlavaOnevisionClips)
class LlavaOnevisionForConditionalGeneration(LlavaNextForConditionalGeneration):
    """Tower, projector, the row behind each line, and decoder."""

    def placeholder_token_ids(self) -> list[int]:
        """See `MediaLanguageModel`."""
        return [self.config.image_token_id, self.config.video_token_id]

    def encode_media(
        self, *, pixel_values_videos: Any = None, video_embeds: Any = None, **kwargs: Any
    ) -> dict[int, Sequence[torch.Tensor]]:
        """See `MediaLanguageModel`; clips as frames `(frames, channels, image_size, image_size)`, or embeddings."""
        encoded = super().encode_media(**kwargs)
        if video_embeds is not None:
            encoded[self.config.video_token_id] = each_item(video_embeds, 2)
        elif pixel_values_videos is not None:
            clips = [self.encode_clip(frames) for frames in pictures_of(pixel_values_videos)]
            encoded[self.config.video_token_id] = clips
        return encoded

    def encode_clip(self, frames: torch.Tensor) -> torch.Tensor:
        """The rows of a clip, given its frames `(frames, channels, image_size, image_size)`."""
        side = patches_per_side(self.config)
        rows = self.project(frames).view(len(frames), side, side, -1).permute(0, 3, 1, 2)
        pooled = torch.nn.functional.interpolate(rows, size=[math.ceil(side / 2)] * 2, mode="bilinear")
        return torch.cat((pooled.permute(0, 2, 3, 1).flatten(0, 2), self.image_newline[None]))

    def shrunk(self, grid: torch.Tensor) -> torch.Tensor:
        """See `LlavaNextForConditionalGeneration`."""
        size = within_bound((grid.shape[0], grid.shape[1]), most_places(self.config))
        if size == tuple(grid.shape[:2]):
            return grid
        shrunk = torch.nn.functional.interpolate(grid.permute(2, 0, 1)[None], list(size), mode="bilinear")
        return shrunk[0].permute(1, 2, 0)
