"""LLaVA-NeXT: LLaVA with pictures as tiles of the tower's size, and a learned row at the end of each line of rows.

Paper: Liu et al. 2024, "LLaVA-NeXT: Improved reasoning, OCR, and world knowledge". Reference: `transformers`
`LlavaNextForConditionalGeneration`. Placeholders: `<image>` becomes the rows of the whole picture at the tower's size,
then those of the tiles without padding bars, line by line, with one more after each line.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from sensorium.config import EngineConfig
from sensorium.errors import ModelError
from sensorium.model_executor.layers.parameters import new_parameter
from sensorium.model_executor.models.llava import (
    LlavaForConditionalGeneration,
    drops_first_row,
    patches_per_side,
    tower_of,
)
from sensorium.model_executor.models.media_common import Pieces, stacked
from sensorium.model_executor.models.media_inputs import PictureInputs, Size, takes_media
from sensorium.model_executor.models.tiles import Pair, assemble, best_resolution, unpadded


def tile_grid(hf_config: Any, size: Pair) -> Pair:
    """Rows and columns of the tiles of a picture."""
    tile = hf_config.vision_config.image_size
    resolutions = tuple((height, width) for height, width in hf_config.image_grid_pinpoints)
    height, width = best_resolution(size, resolutions)
    return height // tile, width // tile


class LlavaNextPictures(PictureInputs):
    """Pictures as tiles, after the whole picture."""

    def pieces_of_size(self, size: Size) -> Pieces:
        """See `MediaInputs`."""
        rows, columns = self.lines((size[0], size[1]))
        return self.pieces_of_rows(patches_per_side(self.config) ** 2 + rows * (columns + 1))

    def pieces_of_rows(self, num_rows: int) -> Pieces:
        """See `MediaInputs`."""
        return ((self.row_id, num_rows),)

    def lines(self, size: Pair) -> Pair:
        """Rows and columns of all tiles together, without padding bars."""
        side, (down, across) = patches_per_side(self.config), tile_grid(self.config, size)
        return unpadded(size, (down * side, across * side))

    def pixels_of_size(self, size: Size) -> int:
        """See `PictureInputs`."""
        down, across = tile_grid(self.config, (size[0], size[1]))
        return int((down * across + 1) * self.config.vision_config.image_size**2)

    def sizes(self) -> Iterable[Size]:
        """See `MediaInputs`: sizes that fill their tiles."""
        return [(height, width) for height, width in self.config.image_grid_pinpoints]


@takes_media(LlavaNextPictures)
class LlavaNextForConditionalGeneration(LlavaForConditionalGeneration):
    """Tower, projector, the row at the end of each line, and decoder.

    Raises:
        ModelError: The tower's selected rows of a tile aren't a square.
    """

    def __init__(self, *, config: EngineConfig, prefix: str = "") -> None:
        super().__init__(config=config, prefix=prefix)
        if tower_of(self.config).num_class_tokens != drops_first_row(self.config):
            strategy = self.config.vision_feature_select_strategy
            raise ModelError(
                f"vision_feature_select_strategy: got {strategy!r} for {self.config.vision_config.model_type!r}, "
                "expected what leaves a row for each patch. Correct config.json."
            )
        self.image_newline = new_parameter(self.config.get_text_config().hidden_size)

    def encode_pictures(self, pictures: Sequence[torch.Tensor], image_sizes: Any) -> Sequence[torch.Tensor]:
        """See `LlavaForConditionalGeneration`; a picture's first tile is the whole, and may be the only one."""
        rows = torch.split(self.project(torch.cat(list(pictures))), [len(each) for each in pictures])
        sizes = stacked(image_sizes, 1).tolist()
        return [self.in_lines(tiles, (height, width)) for tiles, (height, width) in zip(rows, sizes, strict=True)]

    def in_lines(self, tiles: torch.Tensor, size: Pair) -> torch.Tensor:
        """A picture's rows in the order of the prompt, given `(tiles, side^2, width)`."""
        whole, parts = tiles[0], tiles[1:]
        if not len(parts):
            return torch.cat((whole, self.image_newline[None]))
        grid = self.shrunk(assemble(parts, tile_grid(self.config, size), math.isqrt(len(whole)), size))
        ends = self.image_newline.expand(len(grid), 1, -1)
        return torch.cat((whole, torch.cat((grid, ends), dim=1).flatten(0, 1)))

    def shrunk(self, grid: torch.Tensor) -> torch.Tensor:
        """The lines `(rows, columns, width)` of a picture, shrunk if the model bounds them."""
        return grid
