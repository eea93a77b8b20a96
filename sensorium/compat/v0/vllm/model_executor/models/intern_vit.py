"""InternViT with V0's constructor.

Paper: Chen et al. 2023, "InternVL", section 3.1. Reference: `transformers` `InternVLVisionModel`, under the names of
the checkpoints that came before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from sensorium.compat.v0.towers import FusedAttention, TowerEncoder, TowerMLP, load_tower, resized_grid
from sensorium.model_executor.layers.encoder import PatchEmbedding, image_patches
from sensorium.model_executor.layers.layernorm import RMSNorm
from sensorium.model_executor.layers.parameters import new_parameter
from sensorium.model_executor.layers.quantization import QuantizationConfig

__all__ = ["InternVisionEmbeddings", "InternVisionModel", "InternVisionPatchModel"]

NORMS = {"rms_norm": RMSNorm, "layer_norm": nn.LayerNorm}


class InternVisionEmbeddings(nn.Module):
    """The class token and the patches, each plus the embedding of its place."""

    def __init__(self, config: Any, prefix: str = "") -> None:
        super().__init__()
        self.patch_size: int = config.patch_size
        width = config.hidden_size
        self.class_embedding = new_parameter(1, 1, width)
        self.patch_embedding = PatchEmbedding(3 * self.patch_size**2, width, prefix=f"{prefix}.patch_embedding")
        self.position_embedding = new_parameter(1, (config.image_size // self.patch_size) ** 2 + 1, width)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(B, 3, height, width)` to `(B, 1 + patches, hidden_size)`."""
        patches, _ = self.patch_embedding(image_patches(pixel_values, self.patch_size))
        rows, columns = (side // self.patch_size for side in pixel_values.shape[-2:])
        first, others = self.position_embedding[0, :1], self.position_embedding[0, 1:]
        positions = torch.cat((first, resized_grid(others, rows, columns)))
        return torch.cat((self.class_embedding.expand(len(patches), -1, -1), patches), dim=1) + positions


class InternVisionPatchModel(nn.Module):
    """Embedded patches alone, for models whose decoder does the rest."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.embeddings = InternVisionEmbeddings(config)

    def get_input_embeddings(self) -> nn.Module:
        """What embeds pictures."""
        return self.embeddings

    def forward(
        self, pixel_values: torch.Tensor | None = None, pixel_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Pictures `(B, 3, height, width)`, or rows that are embedded already, to `(B, 1 + patches, hidden_size)`.

        Raises `ValueError` if neither is given.
        """
        if pixel_embeds is not None:
            return pixel_embeds
        if pixel_values is None:
            raise ValueError(
                "pictures of InternViT: got none, expected pixel_values or pixel_embeds. Pass one of them."
            )
        rows: torch.Tensor = self.embeddings(pixel_values)
        return rows


class InternVisionEncoderLayer(nn.Module):
    """`x + ls1 * attn(norm1(x))`, then `x + ls2 * mlp(norm2(x))`."""

    def __init__(self, config: Any, quant_config: QuantizationConfig | None = None, prefix: str = "") -> None:
        super().__init__()
        width, norm = config.hidden_size, NORMS[config.norm_type]
        qk_norm = partial(RMSNorm, width, eps=config.layer_norm_eps) if config.qk_normalization else None
        self.attn = FusedAttention(
            *(width, config.num_attention_heads, config.qkv_bias, quant_config, f"{prefix}.attn"), make_qk_norm=qk_norm
        )
        self.mlp = TowerMLP(config, quant_config, f"{prefix}.mlp")
        self.norm1 = norm(width, eps=config.layer_norm_eps)
        self.norm2 = norm(width, eps=config.layer_norm_eps)
        self.ls1, self.ls2 = new_parameter(width), new_parameter(width)

    def forward(self, hidden_states: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        """`(B, S, hidden_size)` to the same."""
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states), cu_seqlens) * self.ls1
        output: torch.Tensor = self.mlp(self.norm2(hidden_states)) * self.ls2
        return hidden_states + output


class InternVisionModel(InternVisionPatchModel):
    """The tower; the first row is the class token's.

    Args:
        config: InternViT's config.
        quant_config: How linear layers hold their weights.
        num_hidden_layers_override: How many layers; all by default.
        num_dummy_heads: Heads that ranks needed to share the others evenly; here every rank has the tower whole.
        prefix: The module's name in the model.
    """

    def __init__(
        self,
        config: Any,
        quant_config: QuantizationConfig | None = None,
        *,
        num_hidden_layers_override: int | None = None,
        num_dummy_heads: int = 0,
        prefix: str = "",
    ) -> None:
        super().__init__(config)
        self.encoder = TowerEncoder(
            *(config, quant_config, num_hidden_layers_override, f"{prefix}.encoder"),
            make_layer=InternVisionEncoderLayer,
        )

    def forward(
        self, pixel_values: torch.Tensor | None = None, pixel_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `InternVisionPatchModel`; behind the layers."""
        features: torch.Tensor = self.encoder(super().forward(pixel_values, pixel_embeds))
        return features

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill the tower."""
        return load_tower(self, weights)
