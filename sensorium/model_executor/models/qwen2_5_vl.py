"""Qwen2.5-VL: Qwen2-VL with a tower that mostly attends within windows, and positions that follow a clip's
time.

Paper: Bai et al. 2025, "Qwen2.5-VL Technical Report". Reference: `transformers`
`Qwen2_5_VLForConditionalGeneration`. Placeholders: as in Qwen2-VL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from sensorium.distributed import constructing_tower
from sensorium.inputs import InputContext
from sensorium.model_executor.layers.decoder import GatedMLP
from sensorium.model_executor.layers.layernorm import RMSNorm
from sensorium.model_executor.layers.quantization import QuantizationConfig
from sensorium.model_executor.layers.tower import Grid, TowerPlan, frame_starts, starts_of
from sensorium.model_executor.models.media_common import as_items
from sensorium.model_executor.models.qwen2_vision import Qwen2VisionTransformer
from sensorium.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration, map_videos
from sensorium.model_executor.models.qwen_vl_inputs import Item, grids_of
from sensorium.multimodal import MULTIMODAL_REGISTRY, MultiModalKwargs

if TYPE_CHECKING:
    from transformers import PretrainedConfig

IntArray = np.ndarray[Any, np.dtype[np.int64]]
DEFAULT_FPS = 24.0
"""Frames per second of a clip of unknown rate; the default of `transformers` `VideoMetadata`."""


class Qwen2_5_VisionTransformer(Qwen2VisionTransformer):  # noqa: N801
    """The tower. In most layers a patch attends within its window of `window_size` pixels, in others within its frame.

    Before the first layer, squares of patches are sorted by window, so that a window is a contiguous run of rows. The
    merger's rows are sorted back.
    """

    @staticmethod
    def sizes(config: PretrainedConfig) -> tuple[int, int]:
        """Channels within the tower, and of the decoder."""
        return config.hidden_size, config.out_hidden_size

    def make_norm(self) -> nn.Module:
        """The norm before each sub-layer and in the merger."""
        return RMSNorm(self.hidden_size, eps=1e-6)

    def make_mlp(self, quant_config: QuantizationConfig | None, prefix: str) -> nn.Module:
        """The MLP of a layer."""
        config = self.config
        with constructing_tower(config.intermediate_size):
            return GatedMLP(self.hidden_size, config.intermediate_size, config.hidden_act, True, quant_config, prefix)

    def plan(self, grids: Sequence[Grid]) -> TowerPlan:
        """See `RecordableTower`."""
        order, lengths = windows_of(grids, self.merge_size, self._squares_per_window())
        square = self.merge_size**2
        positions = self.positions(grids).reshape(-1, square, 2)[order].reshape(-1, 2)
        return TowerPlan(
            len(positions),
            {"positions": positions},
            {"by_window": order.astype(np.int32), "by_place": np.argsort(order).astype(np.int32)},
            {"frames": frame_starts(grids), "windows": starts_of(lengths * square)},
        )

    def compute(self, pixel_values: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See `RecordableTower`."""
        ordered = reorder(pixel_values, tensors["by_window"], self.merge_size**2)
        hidden_states = self.patch_embed["proj"](ordered)[0]
        cos_sin = self.cos_sin(tensors["positions"])
        for index, block in enumerate(self.blocks):
            is_full = index in self.config.fullatt_block_indexes
            hidden_states = block(hidden_states, cos_sin, tensors["frames" if is_full else "windows"])
        rows: torch.Tensor = self.merger(hidden_states)
        return rows[tensors["by_place"]]

    def _squares_per_window(self) -> int:
        """Side of a window in merged squares."""
        return int(self.config.window_size // self.merge_size // self.config.patch_size)


def reorder(rows: torch.Tensor, order: torch.Tensor, group: int) -> torch.Tensor:
    """Permute groups of `group` rows."""
    return rows.view(-1, group, rows.shape[-1])[order].view(rows.shape)


def windows_of(grids: Sequence[Grid], merge_size: int, window: int) -> tuple[IntArray, IntArray]:
    """The permutation that sorts squares by window, and the number of squares in each window.

    Windows don't extend over frames; those at the right and lower edges may be smaller. For example, a frame of 2 x 3
    squares, numbered 0 1 2 / 3 4 5, with windows of 2 x 2 has the order 0 1 3 4 2 5 and the lengths 4, 2.
    """
    orders, lengths, first = [], [], 0
    for t, h, w in grids:
        rows, columns = h // merge_size, w // merge_size
        frame, row, column = np.indices((t, rows, columns)).reshape(3, -1)
        per_row = -(-columns // window)
        window_of = (frame * -(-rows // window) + row // window) * per_row + column // window
        orders.append(first + np.argsort(window_of, kind="stable"))
        lengths.append(np.bincount(window_of))
        first += t * rows * columns
    return np.concatenate(orders), np.concatenate(lengths)


def map_timed_videos(
    ctx: InputContext,
    data: Item | list[Item],
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> MultiModalKwargs:
    """As Qwen2-VL's, and `second_per_grid_ts` `(videos,)`: seconds that one step of the grid in time takes."""
    mapped = map_videos(ctx, data, min_pixels=min_pixels, max_pixels=max_pixels)
    frames_per_step = ctx.get_hf_config().vision_config.temporal_patch_size
    seconds = [seconds_per_step(clip, frames_per_step) for clip in as_items(data)]
    mapped["second_per_grid_ts"] = torch.cat(seconds)
    return mapped


def seconds_per_step(clip: Item, frames_per_step: int) -> torch.Tensor:
    """Seconds per step of the grid, `(1,)`, or `(clips,)` for a dict of embeddings, which may contain them."""
    if isinstance(clip, Mapping):
        given = clip.get("second_per_grid_ts", torch.ones(len(grids_of(clip["video_grid_thw"]))))
        return torch.as_tensor(given, dtype=torch.float32).reshape(-1)
    metadata = getattr(clip, "metadata", None) or {}
    fps = metadata.get("fps") or DEFAULT_FPS
    if metadata.get("frames_indices") is not None and metadata.get("total_num_frames"):
        fps *= len(metadata["frames_indices"]) / metadata["total_num_frames"]
    return torch.tensor([frames_per_step / fps], dtype=torch.float32)


@MULTIMODAL_REGISTRY.register_input_mapper("video", map_timed_videos)
class Qwen2_5_VLForConditionalGeneration(Qwen2VLForConditionalGeneration):  # noqa: N801
    """Tower and decoder; the rest is inherited from Qwen2-VL."""

    tower_class = Qwen2_5_VisionTransformer
