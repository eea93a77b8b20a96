"""SigLIP's vision tower with V0's constructor, and what V0 had beside it."""

from __future__ import annotations

from typing import Any

import torch

from sensorium.compat.v0.tower_inputs import (
    dummy_image,
    dummy_video,
    processor_factory,
    sequence_factory,
)
from sensorium.compat.v0.towers import NamedTower, Tower, TowerEncoder, TowerLayer, TowerMLP, resized_grid
from sensorium.model_executor.layers.encoder import image_patches
from sensorium.model_executor.models.siglip import SiglipVisionEmbeddings as RegisteredEmbeddings

__all__ = [
    "SiglipEncoder",
    "SiglipEncoderLayer",
    "SiglipMLP",
    "SiglipVisionModel",
    "SiglipVisionTransformer",
    "dummy_image_for_siglip",
    "dummy_seq_data_for_siglip",
    "dummy_video_for_siglip",
    "get_max_siglip_image_tokens",
    "get_siglip_image_feature_size",
    "get_siglip_num_patches",
    "get_siglip_patch_grid_length",
    "input_processor_for_siglip",
]

SiglipMLP = TowerMLP, resized_grid
SiglipEncoderLayer = TowerLayer
SiglipEncoder = TowerEncoder
dummy_image_for_siglip = dummy_image
dummy_video_for_siglip = dummy_video


def get_siglip_patch_grid_length(*, image_size: int, patch_size: int) -> int:
    """Patches along a side; a rest at the edge is left out."""
    return image_size // patch_size


def get_siglip_num_patches(*, image_size: int, patch_size: int) -> int:
    """Patches of a picture."""
    return get_siglip_patch_grid_length(image_size=image_size, patch_size=patch_size) ** 2


def get_siglip_image_feature_size(hf_config: Any) -> int:
    """Rows of a picture: one for each patch."""
    return get_siglip_num_patches(image_size=hf_config.image_size, patch_size=hf_config.patch_size)


def get_max_siglip_image_tokens(hf_config: Any) -> int:
    """Most rows of a picture: all have the same number."""
    return get_siglip_image_feature_size(hf_config)


dummy_seq_data_for_siglip = sequence_factory(get_siglip_image_feature_size)
input_processor_for_siglip = processor_factory(get_siglip_image_feature_size)


class SiglipVisionEmbeddings(RegisteredEmbeddings):
    """The patches, each plus the embedding of its place; that of places between may be interpolated."""

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """`(B, channels, height, width)` to `(B, patches, hidden_size)`."""
        if not interpolate_pos_encoding:
            return super().forward(pixel_values)
        patches: torch.Tensor = self.patch_embedding(image_patches(pixel_values, self.patch_size))[0]
        rows, columns = (side // self.patch_size for side in pixel_values.shape[-2:])
        return patches + resized_grid(self.position_embedding.weight, rows, columns)


class SiglipVisionTransformer(Tower):
    """The tower, without its pooling head."""

    embeddings_class = SiglipVisionEmbeddings

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = True) -> torch.Tensor:
        """`(B, channels, H, W)` to `(B, patches, hidden_size)`."""
        return self.encode(self.embeddings(pixel_values, interpolate_pos_encoding))


class SiglipVisionModel(NamedTower):
    """The tower under its name."""

    tower_class = SiglipVisionTransformer

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """`(B, channels, H, W)` to `(B, patches, hidden_size)`."""
        features: torch.Tensor = self.vision_model(pixel_values, interpolate_pos_encoding)
        return features
