"""GLM-4V's vision tower with V0's constructor: patches, layers with norms behind attention and MLP, and an adapter.

Paper: Sun et al. 2023, "EVA-CLIP"; Wang et al. 2023, "CogVLM", section 2.1, of which this is the tower.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import nn

from sensorium.compat.v0.towers import FusedAttention, TowerMLP
from sensorium.distributed import ONE_RANK, constructing_for
from sensorium.model_executor.layers.activation import SiluAndMul
from sensorium.model_executor.layers.encoder import PatchEmbedding as Convolution
from sensorium.model_executor.layers.encoder import image_patches
from sensorium.model_executor.layers.linear import MergedColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from sensorium.model_executor.layers.parameters import new_parameter
from sensorium.model_executor.layers.quantization import QuantizationConfig

__all__ = ["EVA2CLIPModel"]


class PatchEmbedding(nn.Module):
    """The class token and the patches, each plus the embedding of its place."""

    def __init__(self, config: Any, prefix: str = "") -> None:
        super().__init__()
        self.patch_size: int = config.patch_size
        channels = config.in_channels * self.patch_size**2
        self.proj = Convolution(channels, config.hidden_size, prefix=f"{prefix}.proj")
        self.cls_embedding = new_parameter(1, config.hidden_size)
        self.position_embedding = nn.Embedding(config.num_positions, config.hidden_size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """`(B, channels, height, width)` to `(B, 1 + patches, hidden_size)`."""
        patches, _ = self.proj(image_patches(images, self.patch_size))
        rows = torch.cat((self.cls_embedding.expand(len(patches), -1, -1), patches), dim=1)
        return rows + self.position_embedding.weight


class Attention(FusedAttention):
    """Attention under GLM's names."""

    names: ClassVar[tuple[str, str]] = ("query_key_value", "dense")


class TransformerLayer(nn.Module):
    """`x + norm(attention(x))`, then `x + norm(mlp(x))`."""

    def __init__(self, config: Any, quant_config: QuantizationConfig | None = None, prefix: str = "") -> None:
        super().__init__()
        width = config.hidden_size
        self.input_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = Attention(width, config.num_heads, True, quant_config, f"{prefix}.attention")
        self.mlp = TowerMLP(config, quant_config, f"{prefix}.mlp")
        self.post_attention_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(B, S, hidden_size)` to the same."""
        hidden_states = hidden_states + self.input_layernorm(self.attention(hidden_states))
        output: torch.Tensor = self.post_attention_layernorm(self.mlp(hidden_states))
        return hidden_states + output


class Transformer(nn.Module):
    """The layers."""

    def __init__(self, config: Any, quant_config: QuantizationConfig | None = None, prefix: str = "") -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TransformerLayer(config, quant_config, f"{prefix}.layers.{index}")
            for index in range(config.num_hidden_layers)
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(B, S, hidden_size)` to the same."""
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


class GLU(nn.Module):
    """The adapter: a projection, and a gated MLP behind a norm."""

    def __init__(
        self, config: Any, in_features: int, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.ffn_hidden_size
        settings: dict[str, Any] = {"bias": False, "quant_config": quant_config}
        with constructing_for(ONE_RANK):
            self.linear_proj = ReplicatedLinear(in_features, width, **settings, prefix=f"{prefix}.linear_proj")
            self.merged_proj = MergedColumnParallelLinear(
                width, [inner] * 2, **settings, prefix=f"{prefix}.merged_proj"
            )
            self.dense_4h_to_h = RowParallelLinear(inner, width, **settings, prefix=f"{prefix}.dense_4h_to_h")
        self.norm1 = nn.LayerNorm(width)
        self.act1 = nn.GELU()
        self.act2 = SiluAndMul()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """`(B, S, in_features)` to `(B, S, hidden_size)`."""
        rows = self.act1(self.norm1(self.linear_proj(rows)[0]))
        output: torch.Tensor = self.dense_4h_to_h(self.act2(self.merged_proj(rows)[0]))[0]
        return output


class EVA2CLIPModel(nn.Module):
    """The tower and its adapter: pictures to rows of the decoder, a first and a last one around those of the patches.

    Args:
        config: The whole's config; its `vision_config` is a mapping.
        quant_config: How linear layers hold their weights.
        prefix: The module's name in the model.
    """

    def __init__(self, config: Any, quant_config: QuantizationConfig | None = None, prefix: str = "") -> None:
        super().__init__()
        vision = SimpleNamespace(**config.vision_config)
        self.patch_embedding = PatchEmbedding(vision, f"{prefix}.patch_embedding")
        self.transformer = Transformer(vision, quant_config, f"{prefix}.transformer")
        self.conv = nn.Conv2d(vision.hidden_size, config.hidden_size, kernel_size=2, stride=2)
        self.linear_proj = GLU(config, config.hidden_size, quant_config, f"{prefix}.linear_proj")
        self.boi, self.eoi = new_parameter(1, 1, config.hidden_size), new_parameter(1, 1, config.hidden_size)
        self.scaling_factor: float = vision.scaling_factor

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """`(B, channels, height, width)` to `(B, 2 + patches / 4, hidden_size)`."""
        patches = self.transformer(self.patch_embedding(images))[:, 1:]
        side = math.isqrt(patches.shape[1])
        grid = patches.transpose(1, 2).unflatten(2, (side, side))
        rows = self.linear_proj(self.conv(grid).flatten(2).transpose(1, 2))
        first, last = (each.expand(len(rows), -1, -1) for each in (self.boi, self.eoi))
        return torch.cat((first, rows, last), dim=1) / self.scaling_factor
