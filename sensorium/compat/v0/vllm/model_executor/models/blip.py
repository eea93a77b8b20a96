"""BLIP's vision tower with V0's constructor, and what V0 had beside it.

Paper: Li et al. 2022, "BLIP", section 3.1. Reference: `transformers` `Blip2VisionModel`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from sensorium.compat.v0.tower_inputs import (
    dummy_image,
    num_patches,
    patch_grid_length,
    processor_factory,
    sequence_factory,
)
from sensorium.compat.v0.towers import FusedAttention, Tower, TowerLayer
from sensorium.model_executor.layers.encoder import PatchEmbedding, image_patches
from sensorium.model_executor.layers.parameters import new_parameter
from sensorium.model_executor.layers.quantization import QuantizationConfig

__all__ = [
    "BlipVisionModel",
    "dummy_image_for_blip",
    "dummy_seq_data_for_blip",
    "get_blip_image_feature_size",
    "get_blip_num_patches",
    "get_blip_patch_grid_length",
    "get_max_blip_image_tokens",
    "input_processor_for_blip",
]

get_blip_patch_grid_length = patch_grid_length
get_blip_num_patches = num_patches
dummy_image_for_blip = dummy_image


def get_blip_image_feature_size(hf_config: Any) -> int:
    """Rows of a picture: one for each patch."""
    return num_patches(image_size=hf_config.image_size, patch_size=hf_config.patch_size)


def get_max_blip_image_tokens(hf_config: Any) -> int:
    """Most rows of a picture: all have the same number."""
    return get_blip_image_feature_size(hf_config)


dummy_seq_data_for_blip = sequence_factory(get_blip_image_feature_size)
input_processor_for_blip = processor_factory(get_blip_image_feature_size)


class BlipVisionEmbeddings(nn.Module):
    """The class token and the patches, each plus the embedding of its place."""

    def __init__(self, config: Any, prefix: str = "") -> None:
        super().__init__()
        self.patch_size: int = config.patch_size
        width, count = config.hidden_size, get_blip_image_feature_size(config)
        self.class_embedding = new_parameter(1, 1, width)
        self.patch_embedding = PatchEmbedding(3 * self.patch_size**2, width, prefix=f"{prefix}.patch_embedding")
        self.position_embedding = new_parameter(1, count + 1, width)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(B, 3, image_size, image_size)` to `(B, 1 + patches, hidden_size)`."""
        patches, _ = self.patch_embedding(image_patches(pixel_values, self.patch_size))
        rows = torch.cat((self.class_embedding.expand(len(patches), -1, -1), patches), dim=1)
        return rows + self.position_embedding


class BlipAttention(FusedAttention):
    """Attention whose projections are fused in checkpoints."""

    names: ClassVar[tuple[str, str]] = ("qkv", "projection")


class BlipEncoderLayer(TowerLayer):
    """A layer of the tower."""

    def make_attention(self, config: Any, quant_config: QuantizationConfig | None, prefix: str) -> nn.Module:
        """See `TowerLayer`."""
        bias = getattr(config, "qkv_bias", True)
        return BlipAttention(config.hidden_size, config.num_attention_heads, bias, quant_config, prefix)


class BlipVisionModel(Tower):
    """The tower. Its first row is the class token's."""

    embeddings_class = BlipVisionEmbeddings
    layer_class = BlipEncoderLayer
