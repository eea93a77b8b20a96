"""The vision tower of SigLIP: from images of one size to a row per patch.

Paper: Zhai et al. 2023. Reference: `transformers` `SiglipVisionModel`. Used by LLaVA and others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from sensorium.model_executor.layers.encoder import PatchEmbedding, image_patches
from sensorium.model_executor.layers.quantization import QuantizationConfig
from sensorium.model_executor.models.vision_common import FeatureEncoder, load_encoder_weights

if TYPE_CHECKING:
    from transformers import SiglipVisionConfig


class SiglipVisionEmbeddings(nn.Module):
    """The patches, each with its position embedding added."""

    def __init__(self, config: SiglipVisionConfig, prefix: str = "") -> None:
        super().__init__()
        self.patch_size: int = config.patch_size
        self.patch_embedding = PatchEmbedding(
            config.num_channels * config.patch_size**2,
            config.hidden_size,
            prefix=f"{prefix}.patch_embedding",
        )
        self.position_embedding = nn.Embedding((config.image_size // config.patch_size) ** 2, config.hidden_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(B, channels, image_size, image_size)` to `(B, patches, hidden_size)`."""
        patches: torch.Tensor = self.patch_embedding(image_patches(pixel_values, self.patch_size))[0]
        rows, columns = (side // self.patch_size for side in pixel_values.shape[-2:])
        return patches + self.positions(rows, columns)

    def positions(self, rows: int, columns: int) -> torch.Tensor:
        """Position embeddings of a grid of patches, `(rows * columns, hidden_size)`."""
        return self.position_embedding.weight


class SiglipVisionModel(nn.Module):
    """The tower, up to the last layer whose output is used.

    Args:
        config: The vision part of a SigLIP config.
        feature_layers: See `CLIPVisionModel`; `None` for the last layer's output after the final norm.
        quant_config: How linear layers hold their weights.
        prefix: The module's name in the model.
    """

    num_class_tokens = 0
    embeddings_class: ClassVar[type[SiglipVisionEmbeddings]] = SiglipVisionEmbeddings

    def __init__(
        self,
        config: SiglipVisionConfig,
        feature_layers: Sequence[int] | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.embeddings = self.embeddings_class(config, prefix=f"{prefix}.embeddings")
        self.encoder = FeatureEncoder(config, feature_layers or (-1,), quant_config, prefix=f"{prefix}.encoder")
        self.post_layernorm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if feature_layers is None else None
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(B, channels, H, W)` to `(B, patches, hidden_size * feature layers)`."""
        features: torch.Tensor = self.encoder(self.embeddings(pixel_values))
        return features if self.post_layernorm is None else self.post_layernorm(features)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill the tower; the layers beyond the last feature and the pooling head are not used."""
        return load_encoder_weights(self, weights, self.encoder.num_layers)
