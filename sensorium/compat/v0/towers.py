"""Vision towers with the names and constructors of V0, made of Sensorium's parts.

Modules have the names of checkpoints, whereas Sensorium's own towers share one set of names. Every rank has whole
towers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from sensorium.attention import MultiHeadAttention
from sensorium.distributed import ONE_RANK, constructing_for
from sensorium.errors import ModelError
from sensorium.model_executor.layers.encoder import EncoderAttention, EncoderMLP
from sensorium.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from sensorium.model_executor.layers.quantization import QuantizationConfig
from sensorium.model_executor.model_loader.weight_utils import load_fused_weights
from sensorium.model_executor.weight_tracking import ignore_weight

FUSED = {"q_proj": ("qkv_proj", "q"), "k_proj": ("qkv_proj", "k"), "v_proj": ("qkv_proj", "v")}


class TowerMLP(EncoderMLP):
    """The feed-forward part of a layer that a config describes."""

    def __init__(self, config: Any, quant_config: QuantizationConfig | None = None, prefix: str = "") -> None:
        super().__init__(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            quant_config=quant_config,
            prefix=prefix,
        )


class FusedAttention(nn.Module):
    """Bidirectional self-attention whose projections are also fused in checkpoints.

    The arguments are those of `EncoderAttention`.
    """

    names: ClassVar[tuple[str, str]] = ("qkv", "proj")
    """The names of the fused projection and of the output projection."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        bias: bool = True,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        make_qk_norm: Callable[[], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        fused, output = self.names
        head_size = hidden_size // num_heads
        sizes = (hidden_size, head_size, num_heads)
        with constructing_for(ONE_RANK):
            qkv = QKVParallelLinear(*sizes, bias=bias, quant_config=quant_config, prefix=f"{prefix}.{fused}")
            proj = RowParallelLinear(hidden_size, hidden_size, quant_config=quant_config, prefix=f"{prefix}.{output}")
        self.add_module(fused, qkv)
        self.add_module(output, proj)
        self.q_norm = None if make_qk_norm is None else make_qk_norm()
        self.k_norm = None if make_qk_norm is None else make_qk_norm()
        self.attn = MultiHeadAttention(num_heads, head_size, head_size**-0.5)

    def forward(self, hidden_states: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        """`(B, S, hidden_size)` to the same, or flat with `cu_seqlens`."""
        fused: Any = self.get_submodule(self.names[0])
        query, key, value = fused.split(fused(hidden_states)[0])
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        output: torch.Tensor = self.get_submodule(self.names[1])(self.attn(query, key, value, cu_seqlens))[0]
        return output


class TowerLayer(nn.Module):
    """`x + self_attn(layer_norm1(x))`, then `x + mlp(layer_norm2(x))`."""

    def __init__(self, config: Any, quant_config: QuantizationConfig | None = None, prefix: str = "") -> None:
        super().__init__()
        self.self_attn: nn.Module = self.make_attention(config, quant_config, f"{prefix}.self_attn")
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = TowerMLP(config, quant_config, f"{prefix}.mlp")
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def make_attention(self, config: Any, quant_config: QuantizationConfig | None, prefix: str) -> nn.Module:
        """Attention; one that has `qkv_proj` and `out_proj` by default."""
        return EncoderAttention(config.hidden_size, config.num_attention_heads, True, quant_config, prefix)

    def forward(self, hidden_states: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        """`(B, S, hidden_size)` to the same, or flat with `cu_seqlens`."""
        normed = self.layer_norm1(hidden_states)
        hidden_states = hidden_states + self.self_attn(normed, cu_seqlens=cu_seqlens)
        output: torch.Tensor = self.mlp(self.layer_norm2(hidden_states))
        return hidden_states + output


class TowerEncoder(nn.Module):
    """The first layers of a tower, all by default. Raises `ModelError` for more layers than the config has."""

    def __init__(
        self,
        config: Any,
        quant_config: QuantizationConfig | None = None,
        num_hidden_layers_override: int | None = None,
        prefix: str = "",
        *,
        make_layer: Callable[..., nn.Module] = TowerLayer,
    ) -> None:
        super().__init__()
        depth: int = config.num_hidden_layers
        count = depth if num_hidden_layers_override is None else num_hidden_layers_override
        if not 0 <= count <= depth:
            raise ModelError(
                f"layers of a vision tower: got {count}, expected 0 to {depth}. Correct vision_feature_layer."
            )
        self.is_whole = count == depth
        self.layers = nn.ModuleList(
            make_layer(config, quant_config, prefix=f"{prefix}.layers.{index}") for index in range(count)
        )

    def forward(self, inputs_embeds: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        """`(B, S, hidden_size)` to the same, or flat with `cu_seqlens`."""
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(hidden_states, cu_seqlens)
        return hidden_states


class Tower(nn.Module):
    """Embedded patches through layers, and the final norm if it is wanted, or else if no layer is left out.

    Args:
        config: The vision part of a config.
        quant_config: How linear layers hold their weights.
        num_hidden_layers_override: How many layers; all by default.
        require_post_norm: Whether the output is normed.
        prefix: The module's name in the model.
    """

    embeddings_class: ClassVar[Callable[..., nn.Module]]
    layer_class: ClassVar[type[TowerLayer]] = TowerLayer

    def __init__(
        self,
        config: Any,
        quant_config: QuantizationConfig | None = None,
        *,
        num_hidden_layers_override: int | None = None,
        require_post_norm: bool | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.config = config
        self.embeddings = self.embeddings_class(config, prefix=f"{prefix}.embeddings")
        self.encoder = TowerEncoder(
            *(config, quant_config, num_hidden_layers_override, f"{prefix}.encoder"), make_layer=self.layer_class
        )
        self.post_layernorm = None
        if self.encoder.is_whole if require_post_norm is None else require_post_norm:
            self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(B, channels, H, W)` to `(B, rows, hidden_size)`."""
        return self.encode(self.embeddings(pixel_values))

    def encode(self, embedded: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        """Embedded rows `(B, S, hidden_size)`, or flat with `cu_seqlens`, to features of the same shape."""
        features: torch.Tensor = self.encoder(embedded, cu_seqlens)
        return features if self.post_layernorm is None else self.post_layernorm(features)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill the tower."""
        return load_tower(self, weights)


class NamedTower(nn.Module):
    """A tower with the name `vision_model`, as in checkpoints. The arguments are those of `Tower`."""

    tower_class: ClassVar[type[Tower]]
    LEVEL: ClassVar[str] = "vision_model."

    def __init__(self, config: Any, quant_config: QuantizationConfig | None = None, **settings: Any) -> None:
        super().__init__()
        self.config = config
        prefix = f"{settings.pop('prefix', '')}.vision_model"
        self.vision_model = self.tower_class(config, quant_config, **settings, prefix=prefix)

    def forward(self, pixel_values: torch.Tensor, *args: Any, **settings: Any) -> torch.Tensor:
        """`(B, channels, H, W)` to `(B, rows, hidden_size)`."""
        features: torch.Tensor = self.vision_model(pixel_values, *args, **settings)
        return features

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of patches."""
        embedding: nn.Module = self.vision_model.embeddings.get_submodule("patch_embedding")
        return embedding

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.vision_model.device

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill the tower; names may lack the prefix `LEVEL`."""
        return load_tower(self, weights, self.LEVEL)


def resized_grid(table: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Embeddings of the places of a square grid, `(side * side, width)`, for a grid of another size: `(rows * columns,
    width)`, with bicubic interpolation. Source: `transformers` `SiglipVisionEmbeddings.interpolate_pos_encoding`."""
    side = math.isqrt(len(table))
    if rows == columns == side:
        return table
    grid = table.float().view(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
    return resized[0].flatten(1).t().to(table.dtype)


def load_tower(tower: nn.Module, weights: Iterable[tuple[str, torch.Tensor]], level: str = "") -> set[str]:
    """Fill a tower from a checkpoint. Weights of parts that the tower leaves out are ignored: later layers, the final
    norm, a pooling head, and positions that are computed.

    `level`: The prefix of the outermost module, with its dot, which a checkpoint's names may lack.
    """
    parameters = dict(tower.named_parameters())
    parts = {name.split(".")[level.count(".")] for name in parameters}
    layers = {name.partition(".layers.")[2].partition(".")[0] for name in parameters if ".layers." in name}

    def wanted() -> Iterator[tuple[str, torch.Tensor]]:
        for full_name, tensor in weights:
            name = full_name.removeprefix(level)
            layer = name.partition(".layers.")[2].partition(".")[0]
            optional = name.split(".")[0] in ("post_layernorm", "head") and name.split(".")[0] not in parts
            if optional or name.endswith("position_ids") or (layer and layer not in layers):
                ignore_weight(tensor)
            else:
                yield f"{level}{name}", tensor

    return load_fused_weights(tower, wanted(), FUSED)
