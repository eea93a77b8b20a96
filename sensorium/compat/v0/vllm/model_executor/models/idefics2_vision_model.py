"""Idefics 2's vision tower with V0's constructor: SigLIP's, for pictures of any size side by side with padding.

Paper: Laurençon et al. 2024, "What matters when building vision-language models?", section 3.2. Reference:
`transformers` `Idefics2VisionTransformer`. Used by Idefics 3 and MiniCPM-V.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from sensorium.compat.v0.towers import Tower
from sensorium.model_executor.layers.encoder import image_patches
from sensorium.model_executor.layers.quantization import QuantizationConfig
from sensorium.model_executor.models.idefics3 import places
from sensorium.model_executor.models.siglip import SiglipVisionEmbeddings

__all__ = ["Idefics2VisionEmbeddings", "Idefics2VisionTransformer"]


class Idefics2VisionEmbeddings(SiglipVisionEmbeddings):
    """The patches, each plus the embedding of where in its picture it begins."""

    def forward(
        self,
        pixel_values: torch.Tensor,
        patch_attention_mask: torch.Tensor | None = None,
        tgt_sizes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Pictures to `(B, patches, hidden_size)`.

        Args:
            pixel_values: `(B, channels, height, width)`, with padding.
            patch_attention_mask: `(B, rows, columns)`, true for patches that aren't padding; all are by default.
            tgt_sizes: `(B, 2)`, rows and columns of each picture, where its patches are one behind the other.
        """
        patches: torch.Tensor = self.patch_embedding(image_patches(pixel_values, self.patch_size))[0]
        table = self.position_embedding.weight
        index = torch.zeros(patches.shape[:2], dtype=torch.long)
        rows, columns = (side // self.patch_size for side in pixel_values.shape[-2:])
        mask = torch.ones(len(patches), rows, columns, dtype=torch.bool)
        if patch_attention_mask is not None:
            mask = patch_attention_mask.cpu().bool().view_as(mask)
        sizes = [(int(each[:, 0].sum()), int(each[0].sum())) for each in mask]
        if tgt_sizes is not None:
            sizes = [(height, width) for height, width in tgt_sizes.tolist()]
        for row, each, (height, width) in zip(index, mask, sizes, strict=True):
            row[each.flatten()] = places(height, width, math.isqrt(len(table)))
        return patches + table[index.to(table.device)]


class Idefics2VisionTransformer(Tower):
    """The tower.

    Args:
        config: The vision part of a config.
        quant_config: How linear layers hold their weights.
        prefix: The module's name in the model.
    """

    embeddings_class = Idefics2VisionEmbeddings

    def __init__(self, config: Any, quant_config: QuantizationConfig | None = None, prefix: str = "") -> None:
        super().__init__(config, quant_config, require_post_norm=True, prefix=prefix)

    def get_input_embeddings(self) -> torch.nn.Module:
        """What embeds pictures."""
        return self.embeddings

    def forward(
        self,
        pixel_values: torch.Tensor,
        patch_attention_mask: torch.Tensor | None = None,
        tgt_sizes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Pictures to `(B, patches, hidden_size)`, with zeros where there is padding; see the embeddings."""
        embedded = self.embeddings(pixel_values, patch_attention_mask, tgt_sizes)
        if patch_attention_mask is None or bool(patch_attention_mask.all()):
            return self.encode(embedded)
        mask = patch_attention_mask.bool().view(embedded.shape[:2]).to(embedded.device)
        starts = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
        features = torch.zeros_like(embedded)
        features[mask] = self.encode(embedded[mask], starts)
        return features
