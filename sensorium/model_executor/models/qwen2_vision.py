"""The vision tower of Qwen2-VL: images and frames of any size, with rotary positions by row and column.

Paper: Wang et al. 2024, "Qwen2-VL", section 2.1. Reference: `transformers`
`Qwen2VisionTransformerPretrainedModel`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import nn

from sensorium.model_executor.layers.encoder import (
    EncoderAttention,
    EncoderLayer,
    EncoderMLP,
    PatchEmbedding,
)
from sensorium.model_executor.layers.quantization import QuantizationConfig
from sensorium.model_executor.layers.rotary_embedding import CosSin
from sensorium.model_executor.layers.tower import (
    Grid,
    Int32Array,
    RecordableTower,
    TowerPlan,
    frame_starts,
    patch_positions,
)
from sensorium.model_executor.model_loader.weight_utils import FUSED_WEIGHTS, load_fused_weights
from sensorium.model_executor.models.utils import WeightsMapper

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ROTARY_BASE = 10000.0


class PatchMerger(nn.Module):
    """Joins each square of `merge_size^2` patches into one row of the decoder's width.

    `norm` is applied to each patch or, with `norms_merged`, to a square's patches together.
    """

    def __init__(
        self,
        hidden_size: int,
        output_size: int,
        merge_size: int,
        norm: nn.Module,
        prefix: str,
        *,
        norms_merged: bool = False,
    ) -> None:
        super().__init__()
        self.norms_merged = norms_merged
        self.merged_size = hidden_size * merge_size**2
        self.ln_q = norm
        self.mlp = EncoderMLP(
            self.merged_size, self.merged_size, "gelu", prefix=f"{prefix}.mlp", output_size=output_size
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(patches, hidden_size)`, square by square, to `(patches / merge_size^2, output_size)`."""
        normed = hidden_states.view(-1, self.merged_size) if self.norms_merged else hidden_states
        rows: torch.Tensor = self.mlp(self.ln_q(normed).view(-1, self.merged_size))
        return rows


class Qwen2VisionTransformer(RecordableTower):
    """All frames of all items are one flat batch, in which a patch attends within its frame.

    Args:
        config: The vision part of a Qwen2-VL config.
        quant_config: How linear layers hold their weights.
        prefix: The module's name in the model.
    """

    renames = WeightsMapper(
        orig_to_new_substr={
            ".attn.qkv.": ".attn.qkv_proj.",
            ".attn.proj.": ".attn.out_proj.",
            "merger.mlp.0.": "merger.mlp.fc1.",
            "merger.mlp.2.": "merger.mlp.fc2.",
        }
    )
    patch_bias: ClassVar[bool] = False
    """Whether the projection of patches has a bias."""
    inv_freq: torch.Tensor

    def __init__(
        self, config: PretrainedConfig, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.config = config
        self.merge_size = config.spatial_merge_size
        self.hidden_size, output_size = self.sizes(config)
        self.patch_width = config.in_channels * config.temporal_patch_size * config.patch_size**2
        proj = PatchEmbedding(
            self.patch_width, self.hidden_size, bias=self.patch_bias, prefix=f"{prefix}.patch_embed.proj"
        )
        self.patch_embed = nn.ModuleDict({"proj": proj})
        self.blocks = nn.ModuleList(
            EncoderLayer(
                EncoderAttention(self.hidden_size, config.num_heads, quant_config=quant_config, prefix=f"{name}.attn"),
                self.make_mlp(quant_config, f"{name}.mlp"),
                self.make_norm(),
                self.make_norm(),
            )
            for name in (f"{prefix}.blocks.{index}" for index in range(config.depth))
        )
        self.merger = PatchMerger(self.hidden_size, output_size, self.merge_size, self.make_norm(), f"{prefix}.merger")
        half = self.hidden_size // config.num_heads // 2  # a head's channels for the row, and for the column
        exponents = torch.arange(0, half, 2, dtype=torch.float32) / half
        self.register_buffer("inv_freq", 1.0 / ROTARY_BASE**exponents, persistent=False)

    @staticmethod
    def sizes(config: PretrainedConfig) -> tuple[int, int]:
        """Channels within the tower, and of the decoder."""
        return config.embed_dim, config.hidden_size

    def make_norm(self) -> nn.Module:
        """The norm before each sub-layer and in the merger."""
        return nn.LayerNorm(self.hidden_size, eps=1e-6)

    def make_mlp(self, quant_config: QuantizationConfig | None, prefix: str) -> nn.Module:
        """The MLP of a layer."""
        intermediate_size = int(self.hidden_size * self.config.mlp_ratio)
        return EncoderMLP(
            self.hidden_size, intermediate_size, self.config.hidden_act, quant_config=quant_config, prefix=prefix
        )

    def plan(self, grids: Sequence[Grid]) -> TowerPlan:
        """See `RecordableTower`."""
        starts = frame_starts(grids)
        return TowerPlan(int(starts[-1]), {"positions": self.positions(grids)}, starts={"frames": starts})

    def compute(self, pixel_values: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See `RecordableTower`."""
        hidden_states = self.patch_embed["proj"](pixel_values)[0]
        cos_sin = self.cos_sin(tensors["positions"])
        for block in self.blocks:
            hidden_states = block(hidden_states, cos_sin, tensors["frames"])
        rows: torch.Tensor = self.merger(hidden_states)
        return rows

    def positions(self, grids: Sequence[Grid]) -> Int32Array:
        """Row and column of each patch, `(patches, 2)`."""
        return np.concatenate([patch_positions(grid, self.merge_size) for grid in grids])

    def cos_sin(self, positions: torch.Tensor) -> CosSin:
        """Cosines and sines `(patches, head_size / 2)`: the first half by row, the second by column."""
        angles = (positions[:, :, None] * self.inv_freq).flatten(1)
        return angles.cos(), angles.sin()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill the tower from a checkpoint's names, relative to it."""
        return load_fused_weights(self, self.renames.apply(weights), FUSED_WEIGHTS)
