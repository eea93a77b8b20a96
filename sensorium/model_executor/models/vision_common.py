"""Shared by vision towers and their models."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from sensorium.errors import ModelError
from sensorium.model_executor.layers.encoder import EncoderAttention, EncoderLayer, EncoderMLP
from sensorium.model_executor.layers.quantization import QuantizationConfig
from sensorium.model_executor.layers.rotary_embedding import CosSin
from sensorium.model_executor.model_loader.weight_utils import FUSED_WEIGHTS, load_fused_weights
from sensorium.model_executor.weight_tracking import ignore_weight

MakeLayer: TypeAlias = Callable[[Any, "QuantizationConfig | None", str], EncoderLayer]
"""Makes a tower's layer, given the tower's config, the quantization, and the layer's name."""

_RENAMES = {"self_attn": "attn", "layer_norm1": "norm1", "layer_norm2": "norm2"}
_LAYER_INDEX = re.compile(r"^encoder\.layers\.(\d+)\.")


class FeatureEncoder(nn.Module):
    """The layers of a tower, up to the last one whose output is used.

    Args:
        config: The tower's config.
        feature_layers: The layers whose outputs are used: 0 is the input of the first layer, `i` the output of the
            i-th, negative numbers count from the end. Several outputs are concatenated along the channels.
        quant_config: How linear layers hold their weights.
        prefix: The module's name in the model.
        make_layer: Makes a layer; by default that of CLIP and SigLIP.
    """

    def __init__(
        self,
        config: Any,
        feature_layers: Sequence[int],
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        make_layer: MakeLayer | None = None,
    ) -> None:
        super().__init__()
        depth = config.num_hidden_layers
        self.feature_layers = [layer + depth + 1 if layer < 0 else layer for layer in feature_layers]
        if any(not 0 <= layer <= depth for layer in self.feature_layers):
            raise ModelError(
                f"vision_feature_layer: got {list(feature_layers)}, expected numbers from {-depth - 1} to {depth}. "
                "Correct config.json."
            )
        self.num_layers = max(self.feature_layers)
        make = make_layer or clip_layer
        self.layers = nn.ModuleList(
            make(config, quant_config, f"{prefix}.layers.{index}") for index in range(self.num_layers)
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        cos_sin: CosSin | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`(B, S, hidden_size)` to `(B, S, hidden_size * feature layers)`; flat with `cu_seqlens`."""
        kept = {0: hidden_states}
        for index, layer in enumerate(self.layers, start=1):
            hidden_states = layer(hidden_states, cos_sin, cu_seqlens)
            if index in self.feature_layers:
                kept[index] = hidden_states
        features = [kept[layer] for layer in self.feature_layers]
        return features[0] if len(features) == 1 else torch.cat(features, dim=-1)


def clip_layer(config: Any, quant_config: QuantizationConfig | None, prefix: str) -> EncoderLayer:
    """A layer of CLIP or SigLIP."""
    width = config.hidden_size
    return EncoderLayer(
        EncoderAttention(width, config.num_attention_heads, quant_config=quant_config, prefix=f"{prefix}.attn"),
        EncoderMLP(
            width, config.intermediate_size, config.hidden_act, quant_config=quant_config, prefix=f"{prefix}.mlp"
        ),
        nn.LayerNorm(width, eps=config.layer_norm_eps),
        nn.LayerNorm(width, eps=config.layer_norm_eps),
    )


def merged_squares(rows: torch.Tensor, columns: int, size: int) -> torch.Tensor:
    """Concatenate the rows of each square of `size * size`: `(B, R, d)` to `(B, R / size^2, size^2 * d)`.

    The rows are a grid of `columns` columns, row by row. For example, those of a 2 x 4 grid, 0 1 2 3 / 4 5 6 7, become
    (0 1 4 5) and (2 3 6 7). Source: the "pixel shuffle" of `transformers` `Idefics3Connector` and `InternVLModel`.
    """
    batch, num_rows, width = rows.shape
    grid = rows.reshape(batch, num_rows // columns // size, size, columns // size, size, width)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(batch, num_rows // size**2, size**2 * width)


def load_encoder_weights(tower: nn.Module, weights: Iterable[tuple[str, torch.Tensor]], num_layers: int) -> set[str]:
    """Fill a tower with an `encoder` from a checkpoint's names, with or without the prefix `vision_model`.

    Weights after the last used layer are ignored: later layers, the final norm (unless the tower has it), the pooling
    head.
    """
    with_final_norm = getattr(tower, "post_layernorm", None) is not None

    def wanted() -> Iterator[tuple[str, torch.Tensor]]:
        for full_name, tensor in weights:
            name = full_name.removeprefix("vision_model.")
            layer = _LAYER_INDEX.match(name)
            is_behind = layer is not None and int(layer[1]) >= num_layers
            is_behind |= name.startswith("head.") or (name.startswith("post_layernorm.") and not with_final_norm)
            if is_behind:
                ignore_weight(tensor)
            else:
                yield ".".join(_RENAMES.get(part, part) for part in name.split(".")), tensor

    return load_fused_weights(tower, wanted(), FUSED_WEIGHTS)
