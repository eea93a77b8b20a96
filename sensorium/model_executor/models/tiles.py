"""Pictures as tiles of the tower's size: the best grid for a picture, and the part of the grid that the picture fills.

A picture is resized to fit the best of the checkpoint's resolutions, padded with bars at two edges, and split into
tiles. The tower's rows in the bars are dropped. Source: Liu et al. 2024, "LLaVA-NeXT"; `transformers` `LlavaNextModel`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TypeAlias

import torch

Pair: TypeAlias = tuple[int, int]
"""Height and width, or rows and columns."""


@lru_cache(maxsize=4096)
def best_resolution(size: Pair, resolutions: tuple[Pair, ...]) -> Pair:
    """The resolution `(height, width)` that keeps most of a picture's pixels, and of several the one with the least
    padding."""

    def quality(resolution: Pair) -> Pair:
        scale = min(resolution[1] / size[1], resolution[0] / size[0])
        kept = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return kept, kept - resolution[0] * resolution[1]

    return max(resolutions, key=quality)


def bars(size: Pair, grid: Pair) -> Pair:
    """The bars of a grid: rows at the top (and as many at the bottom), and columns at the left (and at the right).

    For example, a picture twice as wide as high in a grid of 10 x 10 has the bars (2, 0).
    """
    (height, width), (rows, columns) = size, grid
    if width / height > columns / rows:
        return (rows - int(round(height * (columns / width), 7))) // 2, 0
    return 0, (columns - int(round(width * (rows / height), 7))) // 2


def unpadded(size: Pair, grid: Pair) -> Pair:
    """Rows and columns of a grid without the bars."""
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
