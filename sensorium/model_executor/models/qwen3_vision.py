"""The vision tower of Qwen3-VL: Qwen2-VL's with learned positions in addition to rotary ones, and outputs of several
layers.

Reference: `transformers` `Qwen3VLVisionModel`. The outputs of some inner layers are merged, too, and added to the
outputs of the decoder's first layers (DeepStack, Meng et al. 2024). A row is the decoder's input row followed by these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from sensorium.errors import ModelError
from sensorium.model_executor.layers.encoder import EncoderMLP
from sensorium.model_executor.layers.parameters import new_parameter
from sensorium.model_executor.layers.quantization import QuantizationConfig
from sensorium.model_executor.layers.tower import Grid, TowerPlan
from sensorium.model_executor.models.qwen2_vision import PatchMerger, Qwen2VisionTransformer
from sensorium.model_executor.models.utils import WeightsMapper

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Qwen3VisionTransformer(Qwen2VisionTransformer):
    """The tower. Rows are `(1 + levels) * out_hidden_size` wide."""

    renames = WeightsMapper(
        orig_to_new_substr={
            ".attn.qkv.": ".attn.qkv_proj.",
            ".attn.proj.": ".attn.out_proj.",
            ".mlp.linear_fc": ".mlp.fc",
            ".linear_fc": ".mlp.fc",  # of mergers
            "merger.norm.": "merger.ln_q.",
            "deepstack_merger_list.": "deepstack_mergers.",
            ".norm.": ".ln_q.",
        }
    )
    patch_bias = True

    def __init__(
        self, config: PretrainedConfig, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config, prefix)
        self.levels = list(config.deepstack_visual_indexes)
        if len(set(self.levels)) < len(self.levels) or any(not 0 <= each < config.depth for each in self.levels):
            raise ModelError(
                f"deepstack_visual_indexes: got {self.levels}, expected different layers from 0 to {config.depth - 1}. "
                "Correct config.json."
            )
        self.side = int(config.num_position_embeddings**0.5)
        self.pos_embed = nn.ParameterDict({"weight": new_parameter(config.num_position_embeddings, self.hidden_size)})
        _, output_size = self.sizes(config)
        self.row_width = (1 + len(self.levels)) * output_size
        merged_size = self.hidden_size * self.merge_size**2
        self.deepstack_mergers = nn.ModuleList(
            PatchMerger(
                *(self.hidden_size, output_size, self.merge_size, nn.LayerNorm(merged_size, eps=1e-6)),
                f"{prefix}.deepstack_mergers.{index}",
                norms_merged=True,
            )
            for index in range(len(self.levels))
        )

    @staticmethod
    def sizes(config: PretrainedConfig) -> tuple[int, int]:
        """Channels within the tower, and of the decoder."""
        return config.hidden_size, config.out_hidden_size

    def make_mlp(self, quant_config: QuantizationConfig | None, prefix: str) -> nn.Module:
        """The MLP of a layer."""
        config = self.config
        return EncoderMLP(
            self.hidden_size, config.intermediate_size, config.hidden_act, quant_config=quant_config, prefix=prefix
        )

    def plan(self, grids: Sequence[Grid]) -> TowerPlan:
        """See `RecordableTower`; `extents` are the height and width of each patch's frame."""
        plan = super().plan(grids)
        extents = np.concatenate([np.tile(np.array([[h, w]], dtype=np.int32), (t * h * w, 1)) for t, h, w in grids])
        return TowerPlan(plan.num_patches, {**plan.by_patch, "extents": extents}, starts=plan.starts)

    def compute(self, pixel_values: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See `RecordableTower`."""
        hidden_states = self.patch_embed["proj"](pixel_values)[0]
        hidden_states = hidden_states + self.learned_positions(tensors["positions"], tensors["extents"])
        cos_sin = self.cos_sin(tensors["positions"])
        stacked = []  # in the order of layers, whatever that of mergers
        for index, block in enumerate(self.blocks):
            hidden_states = block(hidden_states, cos_sin, tensors["frames"])
            if index in self.levels:
                stacked.append(self.deepstack_mergers[self.levels.index(index)](hidden_states))
        return torch.cat([self.merger(hidden_states), *stacked], -1)

    def learned_positions(self, positions: torch.Tensor, extents: torch.Tensor) -> torch.Tensor:
        """The position embeddings `(patches, hidden_size)`: the table is resized to each frame, with its corners
        aligned.

        Interpolated bilinearly between the four entries around each patch, in float32.
        """
        places = positions.float() * (self.side - 1) / (extents - 1).clamp(min=1)
        first = places.floor()
        share = (places - first).unsqueeze(-1)
        low = first.long().clamp(0, self.side - 1)
        high = (low + 1).clamp(max=self.side - 1)
        table = self.pos_embed["weight"]

        def row(rows: torch.Tensor) -> torch.Tensor:
            left, right = (F.embedding(rows * self.side + each[:, 1], table).float() for each in (low, high))
            return left * (1 - share[:, 1]) + right * share[:, 1]

        mixed = row(low[:, 0]) * (1 - share[:, 0]) + row(high[:, 0]) * share[:, 0]
        return mixed.to(table.dtype)
