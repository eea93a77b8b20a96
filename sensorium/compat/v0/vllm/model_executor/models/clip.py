"""CLIP's vision tower with V0's constructor, and what V0 had beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sensorium.compat.v0.tower_inputs import (
    dummy_image,
    dummy_video,
    num_patches,
    patch_grid_length,
    processor_factory,
    sequence_factory,
)
from sensorium.compat.v0.towers import NamedTower, Tower, TowerEncoder, TowerLayer, TowerMLP
from sensorium.model_executor.layers.quantization import QuantizationConfig
from sensorium.model_executor.models.clip import CLIPVisionEmbeddings

__all__ = [
    "CLIPMLP",
    "CLIPEncoder",
    "CLIPEncoderLayer",
    "CLIPVisionModel",
    "CLIPVisionTransformer",
    "dummy_image_for_clip",
    "dummy_seq_data_for_clip",
    "dummy_video_for_clip",
    "get_clip_image_feature_size",
    "get_clip_num_patches",
    "get_clip_patch_grid_length",
    "get_max_clip_image_tokens",
    "input_processor_for_clip",
]

CLIPMLP = TowerMLP
CLIPEncoderLayer = TowerLayer
CLIPEncoder = TowerEncoder
get_clip_patch_grid_length = patch_grid_length
get_clip_num_patches = num_patches
dummy_image_for_clip = dummy_image
dummy_video_for_clip = dummy_video


def get_clip_image_feature_size(hf_config: Any) -> int:
    """Rows of a picture: one for each patch, and one for the class token."""
    return num_patches(image_size=hf_config.image_size, patch_size=hf_config.patch_size) + 1


def get_max_clip_image_tokens(hf_config: Any) -> int:
    """Most rows of a picture: all have the same number."""
    return get_clip_image_feature_size(hf_config)


dummy_seq_data_for_clip = sequence_factory(get_clip_image_feature_size)
input_processor_for_clip = processor_factory(get_clip_image_feature_size)


class CLIPVisionTransformer(Tower):
    """The tower, with a norm before the layers. Its first row is the class token's."""

    embeddings_class = CLIPVisionEmbeddings

    def __init__(self, config: Any, quant_config: QuantizationConfig | None = None, **settings: Any) -> None:
        super().__init__(config, quant_config, **settings)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # misspelt in every checkpoint

    def encode(self, embedded: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        """See `Tower`."""
        return super().encode(self.pre_layrnorm(embedded), cu_seqlens)


class CLIPVisionModel(NamedTower):
    """The tower under its name."""

    tower_class = CLIPVisionTransformer
