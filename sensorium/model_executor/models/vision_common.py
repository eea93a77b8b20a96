"""What vision towers and the models around them share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from sensorium.errors import ModelError
from sensorium.model_executor.layers.encoder import EncoderAttention, EncoderLayer, EncoderMLP
from sensorium.model_executor.layers.quantization import QuantizationConfig
from sensorium.model_executor.model_loader.weight_utils import FUSED_WEIGHTS, load_fused_weights
from sensorium.model_executor.weight_tracking import ignore_weight

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, SiglipVisionConfig

_RENAMES = {"self_attn": "attn", "layer_norm1": "norm1", "layer_norm2": "norm2"}
_LAYER_INDEX = re.compile(r"^encoder\.layers\.(\d+)\.")


class FeatureEncoder(nn.Module):
    """The layers of a CLIP or SigLIP tower, as many as the wanted features need.

    Args:
        config: The tower's config.
        feature_layers: Whose outputs are wanted: 0 is the input of the first layer, `i` the output of the
            i-th, negative numbers count from the end. Several are put side by side.
        quant_config: How linear layers hold their weights.
        prefix: The module's name in the model.
    """

    def __init__(
        self,
        config: CLIPVisionConfig | SiglipVisionConfig,
        feature_layers: Sequence[int],
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
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
        hidden_size = config.hidden_size

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)

        def layer(name: str) -> EncoderLayer:
            return EncoderLayer(
                EncoderAttention(
                    hidden_size, config.num_attention_heads, quant_config=quant_config, prefix=f"{name}.attn"
                ),
                EncoderMLP(
                    hidden_size,
                    config.intermediate_size,
                    config.hidden_act,
                    quant_config=quant_config,
                    prefix=f"{name}.mlp",
                ),
                norm(),
                norm(),
            )

        self.layers = nn.ModuleList(layer(f"{prefix}.layers.{index}") for index in range(self.num_layers))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(B, S, hidden_size)` to `(B, S, hidden_size * feature layers)`."""
        kept = {0: hidden_states}
        for index, layer in enumerate(self.layers, start=1):
            hidden_states = layer(hidden_states)
            if index in self.feature_layers:
                kept[index] = hidden_states
        features = [kept[layer] for layer in self.feature_layers]
        return features[0] if len(features) == 1 else torch.cat(features, dim=-1)


def load_encoder_weights(tower: nn.Module, weights: Iterable[tuple[str, torch.Tensor]], num_layers: int) -> set[str]:
    """Fill a CLIP or SigLIP tower from a checkpoint's names, with or without the level `vision_model`.

    What stands behind the last wanted feature is ignored: later layers, the final norm (unless the tower has
    it), the pooling head.
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
