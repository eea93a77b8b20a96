"""What V0's LLaVA had that other models of its kind import: the tower by config, and the projector."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sensorium.compat.v0.vllm.model_executor.models.clip import CLIPVisionModel
from sensorium.compat.v0.vllm.model_executor.models.pixtral import PixtralHFVisionModel
from sensorium.compat.v0.vllm.model_executor.models.siglip import SiglipVisionModel
from sensorium.distributed import ONE_RANK, constructing_for
from sensorium.errors import ModelError
from sensorium.model_executor.layers.activation import get_act_fn
from sensorium.model_executor.layers.linear import ReplicatedLinear
from sensorium.model_executor.layers.quantization import QuantizationConfig

__all__ = ["LlavaMultiModalProjector", "init_vision_tower_for_llava"]

TOWERS: dict[str, type[nn.Module]] = {
    "clip_vision_model": CLIPVisionModel,
    "siglip_vision_model": SiglipVisionModel,
    "pixtral": PixtralHFVisionModel,
}


class LlavaMultiModalProjector(nn.Module):
    """`linear_2(act(linear_1(x)))`, from the tower's width to the decoder's."""

    def __init__(
        self,
        vision_hidden_size: int,
        text_hidden_size: int,
        projector_hidden_act: str,
        multimodal_projector_bias: bool = True,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        bias = multimodal_projector_bias
        with constructing_for(ONE_RANK):
            self.linear_1 = ReplicatedLinear(
                vision_hidden_size, text_hidden_size, bias, quant_config=quant_config, prefix=f"{prefix}.linear_1"
            )
            self.linear_2 = ReplicatedLinear(
                text_hidden_size, text_hidden_size, bias, quant_config=quant_config, prefix=f"{prefix}.linear_2"
            )
        self.act = get_act_fn(projector_hidden_act)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """`(..., vision_hidden_size)` to `(..., text_hidden_size)`."""
        rows: torch.Tensor = self.linear_2(self.act(self.linear_1(image_features)[0]))[0]
        return rows


def init_vision_tower_for_llava(
    hf_config: Any,
    quant_config: QuantizationConfig | None = None,
    *,
    require_post_norm: bool | None = None,
    prefix: str = "",
) -> nn.Module:
    """The tower that a config describes, up to the layer whose output is wanted.

    Raises `ModelError` for a tower of another kind, or several layers.
    """
    vision, layer = hf_config.vision_config, hf_config.vision_feature_layer
    if vision.model_type not in TOWERS or not isinstance(layer, int):
        raise ModelError(
            f"vision tower: got {vision.model_type!r} with vision_feature_layer {layer!r}, expected one of "
            f"{sorted(TOWERS)} with one number. Construct the tower that the model has."
        )
    count = vision.num_hidden_layers + layer + 1 if layer < 0 else layer
    return TOWERS[vision.model_type](
        vision,
        quant_config,
        num_hidden_layers_override=count,
        require_post_norm=require_post_norm,
        prefix=prefix,
    )
