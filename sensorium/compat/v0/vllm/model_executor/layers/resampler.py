"""Resamplers of Qwen-VL and MiniCPM-V: learned queries that attend to a picture's patches, whatever their number.

Paper: Bai et al. 2023, "Qwen-VL", section 2.1. Positions are sines and cosines of a row's and a column's number: He et
al. 2021, appendix A.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from sensorium.compat.v0.towers import resized_grid
from sensorium.distributed import ONE_RANK, constructing_for
from sensorium.model_executor.layers.linear import ReplicatedLinear
from sensorium.model_executor.layers.quantization import QuantizationConfig

__all__ = [
    "DEFAULT_LN",
    "BaseResampler",
    "Resampler2",
    "get_1d_sincos_pos_embed_from_grid",
    "get_2d_sincos_pos_embed",
    "get_2d_sincos_pos_embed_from_grid",
    "get_abs_pos",
]

DEFAULT_LN = partial(nn.LayerNorm, eps=1e-6)
FLAT = (2, 0)
"""Version in which positions are rows one behind the other; in later ones they are a grid."""
Floats = npt.NDArray[np.floating[Any]]


def get_abs_pos(abs_pos: torch.Tensor, tgt_size: torch.Tensor | int | tuple[int, int]) -> torch.Tensor:
    """Embeddings `(side * side, width)` of places, for a grid of `tgt_size` rows and columns."""
    rows, columns = (tgt_size, tgt_size) if isinstance(tgt_size, int) else (int(each) for each in tgt_size)
    return resized_grid(abs_pos, rows, columns)


def get_1d_sincos_pos_embed_from_grid(embed_dim: int, pos: Floats, version: tuple[int, int] = FLAT) -> Floats:
    """Sines, and behind them cosines, of numbers at `embed_dim / 2` frequencies: an axis of `embed_dim` more."""
    half = embed_dim // 2
    frequencies = 1.0 / 10000 ** (np.arange(half, dtype=np.float32) / half)
    angles = (pos.reshape(-1) if version == FLAT else pos)[..., None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)


def get_2d_sincos_pos_embed_from_grid(embed_dim: int, grid: Floats, version: tuple[int, int] = FLAT) -> Floats:
    """The same of two numbers for each place, `(2, ...)`: half of the channels for each."""
    halves = [get_1d_sincos_pos_embed_from_grid(embed_dim // 2, numbers, version) for numbers in grid]
    return np.concatenate(halves, axis=-1)


def get_2d_sincos_pos_embed(
    embed_dim: int, grid_size: int | tuple[int, int], cls_token: bool = False, version: tuple[int, int] = FLAT
) -> Floats:
    """Embeddings of the places of a grid: `(rows * columns, embed_dim)`, or later `(rows, columns, embed_dim)`.

    The column comes first. `cls_token`: with zeros in front, in the first version.
    """
    rows, columns = (grid_size, grid_size) if isinstance(grid_size, int) else (int(each) for each in grid_size)
    numbers = np.meshgrid(np.arange(columns, dtype=np.float32), np.arange(rows, dtype=np.float32))
    embedded = get_2d_sincos_pos_embed_from_grid(embed_dim, np.stack(numbers), version)
    if cls_token and version == FLAT:
        embedded = np.concatenate([np.zeros((1, embed_dim)), embedded])
    return embedded


class _Unchanged(nn.Module):
    """Stands for a projection, where widths are equal."""

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The rows, and no bias, as a linear layer returns them."""
        return rows, None


class BaseResampler(nn.Module):
    """The parts of a resampler; a subclass puts them together.

    Args:
        num_queries: Rows out.
        embed_dim: Their width.
        num_heads: Of attention.
        kv_dim: Width of the rows in, where it is another.
        norm_layer: Makes a norm of a width.
        do_post_projection: Whether what comes out is normed and projected.
        quant_config: How linear layers hold their weights.
        prefix: The module's name in the model.
    """

    def __init__(
        self,
        num_queries: int,
        embed_dim: int,
        num_heads: int,
        kv_dim: int | None = None,
        norm_layer: Callable[[int], nn.LayerNorm] = DEFAULT_LN,
        do_post_projection: bool = True,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.num_queries, self.embed_dim, self.num_heads = num_queries, embed_dim, num_heads
        self.query = nn.Parameter(torch.empty(num_queries, embed_dim))
        self.kv_proj: nn.Module = _Unchanged()
        if kv_dim is not None and kv_dim != embed_dim:
            with constructing_for(ONE_RANK):
                self.kv_proj = ReplicatedLinear(
                    kv_dim, embed_dim, bias=False, quant_config=quant_config, prefix=f"{prefix}.kv_proj"
                )
        self.attn = nn.MultiheadAttention(embed_dim, num_heads)
        self.ln_q, self.ln_kv = norm_layer(embed_dim), norm_layer(embed_dim)
        self.do_post_projection = do_post_projection
        self.ln_post = norm_layer(embed_dim) if do_post_projection else None
        self.proj = nn.Parameter(torch.empty(embed_dim, embed_dim)) if do_post_projection else None

    def _init_weights(self, module: nn.Module) -> None:
        """What V0's subclasses apply to all modules; a checkpoint fills them."""

    def _repeat(self, query: torch.Tensor, N: int) -> torch.Tensor:
        """Queries `(queries, width)` for so many pictures, `(queries, N, width)`."""
        return query[:, None].expand(-1, N, -1)


class Resampler2(BaseResampler):
    """The resampler of Qwen-VL, and of MiniCPM-V 2.0, which is adaptive and projects what comes out.

    Args: as those of `BaseResampler`, and `grid_size`: rows and columns of the queries; `adaptive`: positions are
    computed for the patches' own grid, instead of the queries' being resized to it.
    """

    def __init__(
        self,
        grid_size: int,
        embed_dim: int,
        num_heads: int,
        kv_dim: int | None = None,
        norm_layer: Callable[[int], nn.LayerNorm] = DEFAULT_LN,
        adaptive: bool = False,
        do_post_projection: bool = True,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(
            *(grid_size**2, embed_dim, num_heads, kv_dim, norm_layer, do_post_projection, quant_config, prefix)
        )
        self.adaptive = adaptive
        positions = torch.from_numpy(get_2d_sincos_pos_embed(embed_dim, grid_size)).to(torch.get_default_dtype())
        self.pos_embed = nn.Parameter(positions, requires_grad=False)

    def forward(
        self, x: torch.Tensor, tgt_sizes: torch.Tensor | None = None, attn_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Patches of pictures to rows `(B, queries, embed_dim)`.

        Args:
            x: `(B, patches, kv_dim)`.
            tgt_sizes: Rows and columns of the patches; a square by default.
            attn_mask: Of `nn.MultiheadAttention`.
        """
        side = math.isqrt(x.shape[1])
        rows, columns = (side, side) if tgt_sizes is None else (int(each) for each in tgt_sizes)
        if self.adaptive:
            positions = torch.from_numpy(get_2d_sincos_pos_embed(self.embed_dim, (rows, columns))).to(x)
        else:
            positions = get_abs_pos(self.pos_embed, (rows, columns)).to(x)
        patches = self.ln_kv(self.kv_proj(x)[0]).transpose(0, 1)
        queries = self._repeat(self.ln_q(self.query), len(x)) + self.pos_embed[:, None]
        attended: torch.Tensor = self.attn(queries, patches + positions[:, None], patches, attn_mask=attn_mask)[
            0
        ].transpose(0, 1)
        if self.ln_post is None or self.proj is None:
            return attended
        output: torch.Tensor = self.ln_post(attended) @ self.proj
        return output
