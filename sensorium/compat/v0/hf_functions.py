"""Parts of transformers 4.45 to 4.47 that version 5 doesn't have, reimplemented."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class PixtralRotaryEmbedding(nn.Module):
    """Rotary angles of patches by their position in a square grid of the tower's largest side: the row determines half
    of the channels, and the column the other half.

    Args:
        config: The config of a Pixtral tower.
        device: The device of the angles; by default the current one.
    """

    inv_freq: torch.Tensor

    def __init__(self, config: Any, device: Any = None) -> None:
        super().__init__()
        theta = config.rope_parameters["rope_theta"] if hasattr(config, "rope_parameters") else config.rope_theta
        size = config.head_dim
        freqs = theta ** -(torch.arange(0, size, 2, device=device).float() / size)
        side = torch.arange(config.image_size // config.patch_size, device=freqs.device)
        rows = torch.outer(side, freqs[::2])[:, None].expand(-1, len(side), -1)
        columns = torch.outer(side, freqs[1::2])[None].expand(len(side), -1, -1)
        angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)
        self.register_buffer("inv_freq", torch.cat([angles, angles], dim=-1), persistent=False)

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines `(rows, head_dim)` of positions as `position_ids_in_meshgrid` counts them."""
        angles = self.inv_freq.to(x.device)[position_ids]
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def position_ids_in_meshgrid(patch_embeds_list: Sequence[torch.Tensor], max_width: int) -> torch.Tensor:
    """Positions of all patches of pictures `(..., rows, columns)`, row by row in a grid `max_width` wide."""
    positions = []
    for patches in patch_embeds_list:
        rows, columns = (torch.arange(size, device=patches.device) for size in patches.shape[-2:])
        positions.append((rows[:, None] * max_width + columns).flatten())
    return torch.cat(positions)


def make_batched_videos(videos: Any) -> list[Any]:
    """One clip, or a list of them, as a list of clips `(frames, height, width, 3)`, or lists of frames."""
    if not isinstance(videos, list):
        return [videos]
    return videos if isinstance(videos[0], list) or getattr(videos[0], "ndim", 0) == 4 else [videos]
