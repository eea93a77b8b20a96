"""The vision tower of InternVL: from pictures of one size to a row for the class token, followed by one per patch.

Paper: Chen et al. 2023, "InternVL", section 3.1. Reference: `transformers` `InternVLVisionModel`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sensorium.model_executor.layers.encoder import (
    EncoderAttention,
    EncoderLayer,
    EncoderMLP,
    PatchEmbedding,
    image_patches,
)
from sensorium.model_executor.layers.layernorm import RMSNorm
from sensorium.model_executor.layers.parameters import new_parameter
from sensorium.model_executor.layers.quantization import QuantizationConfig
from sensorium.model_executor.models.utils import WeightsMapper
from sensorium.model_executor.models.vision_common import FeatureEncoder, load_encoder_weights

if TYPE_CHECKING:
    from transformers import InternVLVisionConfig

QK_NORM_EPS = 1e-6
NORMS = {"layer_norm": nn.LayerNorm, "rms_norm": RMSNorm}


class InternVLVisionEmbeddings(nn.Module):
    """The class token and the patches, each with its position embedding added if the config has some."""

    def __init__(self, config: InternVLVisionConfig, prefix: str = "") -> None:
        super().__init__()
        (self.patch_size, _), (height, width) = config.patch_size, config.image_size
        self.cls_token = new_parameter(1, 1, config.hidden_size)
        self.patch_embedding = PatchEmbedding(
            config.num_channels * self.patch_size**2, config.hidden_size, prefix=f"{prefix}.patch_embedding"
        )
        num_positions = (height // self.patch_size) * (width // self.patch_size) + 1
        self.position_embeddings = (
            new_parameter(1, num_positions, config.hidden_size) if config.use_absolute_position_embeddings else None
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(B, channels, height, width)` to `(B, 1 + patches, hidden_size)`."""
        patches, _ = self.patch_embedding(image_patches(pixel_values, self.patch_size))
        embedded = torch.cat((self.cls_token.expand(len(patches), -1, -1), patches), dim=1)
        return embedded if self.position_embeddings is None else embedded + self.position_embeddings


def internvl_layer(config: Any, quant_config: QuantizationConfig | None, prefix: str) -> EncoderLayer:
    """A layer of the tower: the outputs of attention and MLP are scaled channel by channel."""
    width, norm = config.hidden_size, NORMS[config.norm_type]
    return EncoderLayer(
        EncoderAttention(
            width,
            config.num_attention_heads,
            config.attention_bias,
            quant_config,
            prefix=f"{prefix}.attn",
            output_bias=True,
            make_qk_norm=partial(RMSNorm, width, eps=QK_NORM_EPS) if config.use_qk_norm else None,
        ),
        EncoderMLP(
            width, config.intermediate_size, config.hidden_act, quant_config=quant_config, prefix=f"{prefix}.mlp"
        ),
        norm(width, eps=config.layer_norm_eps),
        norm(width, eps=config.layer_norm_eps),
        scaled_size=width,
    )


class InternVLVisionModel(nn.Module):
    """The tower, up to the last layer whose output is used. The output of the tower's last layer goes through the final
    norm, if there is one.

    Args:
        config: An InternVL vision config.
        feature_layers: See `FeatureEncoder`.
        quant_config: How linear layers hold their weights.
        prefix: The module's name in the model.
    """

    num_class_tokens = 1
    renames = WeightsMapper(
        orig_to_new_substr={
            ".attention.projection_layer.": ".attn.out_proj.",
            ".attention.": ".attn.",
            ".layernorm_before.": ".norm1.",
            ".layernorm_after.": ".norm2.",
            ".lambda_1": ".scale1",
            ".lambda_2": ".scale2",
            "embeddings.mask_token": None,
        },
        orig_to_new_prefix={
            "encoder.layer.": "encoder.layers.",
            "embeddings.patch_embeddings.projection.": "embeddings.patch_embedding.",
            "layernorm.": "post_layernorm.",
        },
    )

    def __init__(
        self,
        config: InternVLVisionConfig,
        feature_layers: Sequence[int] = (-1,),
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.embeddings = InternVLVisionEmbeddings(config, prefix=f"{prefix}.embeddings")
        self.encoder = FeatureEncoder(config, feature_layers, quant_config, f"{prefix}.encoder", internvl_layer)
        has_norm = list(feature_layers) == [-1] and not config.use_mean_pooling
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if has_norm else None

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(B, channels, height, width)` to `(B, 1 + patches, hidden_size)`; the class token is first."""
        features: torch.Tensor = self.encoder(self.embeddings(pixel_values))
        return features if self.post_layernorm is None else self.post_layernorm(features)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill the tower; layers beyond the last feature are not used."""
        return load_encoder_weights(self, self.renames.apply(weights), self.encoder.num_layers)
