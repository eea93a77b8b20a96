"""Pictures as tiles of the tower's size: which grid of them suits a picture, and what of it is the picture.

A picture is resized into the best of the resolutions that a checkpoint lists, with bars at two edges, and cut. Rows of
the tower that lie in the bars are left out. Source: Liu et al. 2024, "LLaVA-NeXT"; `transformers`
`LlavaNextModel`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TypeAlias

import torch

Pair: TypeAlias = tuple[int, int]
"""Height and width, or rows and columns."""


@lru_cache(maxsize=4096)
def best_resolution(size: Pair, resolutions: tuple[Pair, ...]) -> Pair:
    """The resolution `(height, width)` that keeps most of a picture, and of several the one that wastes least."""

    def quality(resolution: Pair) -> Pair:
        scale = min(resolution[1] / size[1], resolution[0] / size[0])
        kept = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return kept, kept - resolution[0] * resolution[1]

    return max(resolutions, key=quality)


def bars(size: Pair, grid: Pair) -> Pair:
    """Rows at the top and the bottom each, and columns at the left and the right each, of a grid that hold no picture.

    For example, a picture twice as wide as high in a grid of 10 x 10 leaves (2, 0).
    """
    (height, width), (rows, columns) = size, grid
    if width / height > columns / rows:
        return (rows - int(round(height * (columns / width), 7))) // 2, 0
    return 0, (columns - int(round(width * (rows / height), 7))) // 2


def unpadded(size: Pair, grid: Pair) -> Pair:
    """Rows and columns that are left of a grid without the bars."""
    above, beside = bars(size, grid)
    return grid[0] - 2 * above, grid[1] - 2 * beside


def assemble(tiles: torch.Tensor, num_tiles: Pair, side: int, size: Pair) -> torch.Tensor:
    """The rows of a picture without bars, `(rows, columns, width)`.

    Args:
        tiles: `(tiles, side^2, width)`, row by row.
        num_tiles: Rows and columns of tiles.
        side: Rows and columns within a tile.
        size: The picture's height and width.
    """
    (down, across), width = num_tiles, tiles.shape[-1]
    grid = tiles.reshape(down, across, side, side, width).transpose(1, 2).reshape(down * side, across * side, width)
    above, beside = bars(size, (down * side, across * side))
    return grid[above : down * side - above, beside : across * side - beside]
