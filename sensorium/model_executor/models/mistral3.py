"""Mistral 3: Pixtral's tower, squares of patches merged into rows, and Mistral's decoder.

Reference: `transformers` `Mistral3ForConditionalGeneration`. Placeholders: as in Pixtral, a token for each square.
"""

from __future__ import annotations

from typing import Any

import torch

from sensorium.model_executor.layers.encoder import EncoderMLP
from sensorium.model_executor.layers.layernorm import RMSNorm
from sensorium.model_executor.models.llava import LlavaForConditionalGeneration, feature_layers_of
from sensorium.model_executor.models.media_inputs import takes_media
from sensorium.model_executor.models.pixtral import PatchMerger, PixtralPictures, PixtralVisionModel


class Mistral3Projector(EncoderMLP):
    """Norm, merger, and two linear layers."""

    def __init__(self, hf_config: Any, prefix: str = "") -> None:
        text, width = hf_config.get_text_config(), hf_config.vision_config.hidden_size
        super().__init__(
            width,
            text.hidden_size,
            hf_config.projector_hidden_act,
            bias=hf_config.multimodal_projector_bias,
            output_size=text.hidden_size,
            prefix=prefix,
        )
        self.norm = RMSNorm(width, eps=text.rms_norm_eps)
        self.patch_merger = PatchMerger(width, hf_config.spatial_merge_size, prefix=f"{prefix}.patch_merger")

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(patches, hidden_size)`, square by square, to a row `(text hidden_size)` for each square."""
        return super().forward(self.patch_merger(self.norm(features)))


@takes_media(PixtralPictures)
class Mistral3ForConditionalGeneration(LlavaForConditionalGeneration):
    """Tower, projector and decoder."""

    def make_tower(self, quant_config: Any, prefix: str) -> PixtralVisionModel:
        """See `LlavaForConditionalGeneration`."""
        layers, square = feature_layers_of(self.config), self.config.spatial_merge_size
        return PixtralVisionModel(self.config.vision_config, layers, quant_config, prefix=prefix, square=square)

    def make_projector(self, prefix: str) -> Mistral3Projector:
        """See `LlavaForConditionalGeneration`."""
        return Mistral3Projector(self.config, prefix=prefix)
