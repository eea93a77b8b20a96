"""The vision tower of CLIP: from images of one size to a row for the class token, followed by one per patch.

Paper: Radford et al. 2021, section 2.4. Reference: `transformers` `CLIPVisionModel`. Used by LLaVA and
others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from sensorium.model_executor.layers.encoder import PatchEmbedding, image_patches
from sensorium.model_executor.layers.parameters import new_parameter
from sensorium.model_executor.layers.quantization import QuantizationConfig
from sensorium.model_executor.models.vision_common import FeatureEncoder, load_encoder_weights

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig


class CLIPVisionEmbeddings(nn.Module):
    """The class token and the patches, each with its position embedding added."""

    def __init__(self, config: CLIPVisionConfig, prefix: str = "") -> None:
        super().__init__()
        self.patch_size: int = config.patch_size
        self.class_embedding = new_parameter(config.hidden_size)
        self.patch_embedding = PatchEmbedding(
            config.num_channels * config.patch_size**2,
            config.hidden_size,
            bias=False,
            prefix=f"{prefix}.patch_embedding",
        )
        num_positions = (config.image_size // config.patch_size) ** 2 + 1
        self.position_embedding = nn.Embedding(num_positions, config.hidden_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(B, channels, image_size, image_size)` to `(B, 1 + patches, hidden_size)`."""
        patches, _ = self.patch_embedding(image_patches(pixel_values, self.patch_size))
        class_token = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat((class_token, patches), dim=1) + self.position_embedding.weight


class CLIPVisionModel(nn.Module):
    """The tower, up to the last layer whose output is used.

    Args:
        config: The vision part of a CLIP config.
        feature_layers: The layers whose outputs are used: 0 is the input of the first layer, `i` the output of the
            i-th, negative numbers count from the end.
        quant_config: How linear layers hold their weights.
        prefix: The module's name in the model.
    """

    num_class_tokens = 1

    def __init__(
        self,
        config: CLIPVisionConfig,
        feature_layers: Sequence[int] = (-1,),
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.embeddings = CLIPVisionEmbeddings(config, prefix=f"{prefix}.embeddings")
        # The name is misspelt in every checkpoint.
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = FeatureEncoder(config, feature_layers, quant_config, prefix=f"{prefix}.encoder")

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(B, channels, H, W)` to `(B, 1 + patches, hidden_size * feature layers)`; the class token is first."""
        embedded = self.pre_layrnorm(self.embeddings(pixel_values))
        features: torch.Tensor = self.encoder(embedded)
        return features

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill the tower; the layers beyond the last feature and the norm and projection after them are not used."""
        return load_encoder_weights(self, weights, self.encoder.num_layers)
