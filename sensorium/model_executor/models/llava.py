"""LLaVA-1.5: a CLIP, SigLIP or Pixtral tower, two linear layers, and any registered decoder.

Paper: Liu et al. 2023, "Improved Baselines with Visual Instruction Tuning". Reference: `transformers`
`LlavaForConditionalGeneration`. Placeholders: each `<image>` token becomes as many as the tower has patches; with a
Pixtral tower, as in `pixtral.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from sensorium.config import EngineConfig
from sensorium.errors import InvalidRequestError, ModelError
from sensorium.inputs import InputContext
from sensorium.model_executor.layers.encoder import EncoderMLP
from sensorium.model_executor.layers.quantization import QuantizationConfig
from sensorium.model_executor.models.clip import CLIPVisionModel
from sensorium.model_executor.models.media_common import Pieces, language_config
from sensorium.model_executor.models.media_inputs import MediaInputs, PictureInputs, Size, takes_media
from sensorium.model_executor.models.media_language_model import PictureLanguageModel
from sensorium.model_executor.models.pixtral import PixtralPictures, PixtralVisionModel
from sensorium.model_executor.models.siglip import SiglipVisionModel
from sensorium.model_executor.models.utils import (
    WeightsMapper,
    init_registered_model,
    maybe_prefix,
    missing_inner_model,
)

Tower: TypeAlias = CLIPVisionModel | SiglipVisionModel | PixtralVisionModel
TOWERS: dict[str, type[Tower]] = {
    "clip_vision_model": CLIPVisionModel,
    "siglip_vision_model": SiglipVisionModel,
    "pixtral": PixtralVisionModel,
}


def tower_of(hf_config: Any) -> type[Tower]:
    """The class of the config's vision tower."""
    model_type = hf_config.vision_config.model_type
    if model_type not in TOWERS:
        raise ModelError(f"vision tower of LLaVA: got {model_type!r}, expected one of {sorted(TOWERS)}.")
    return TOWERS[model_type]


def drops_first_row(hf_config: Any) -> int:
    """1 if the tower's first row, CLIP's class token, is dropped, else 0."""
    return int(hf_config.vision_feature_select_strategy == "default")


def feature_layers_of(hf_config: Any) -> list[int]:
    """The layers whose outputs the projector gets."""
    layers = hf_config.vision_feature_layer
    return [layers] if isinstance(layers, int) else list(layers)


def patches_per_side(hf_config: Any) -> int:
    """Rows and columns of patches of a picture of the tower's size."""
    side: int = hf_config.vision_config.image_size // hf_config.vision_config.patch_size
    return side


class PicturesOfOneSize(PictureInputs):
    """Pictures are resized to the tower's size, so all have the same number of rows."""

    def pieces_of_rows(self, num_rows: int) -> Pieces:
        """See `MediaInputs`; the number must be that of any picture."""
        pieces = self.pieces_of_size(())
        if self.num_rows(pieces) != num_rows:
            raise InvalidRequestError(
                f"got {num_rows} rows, expected {self.num_rows(pieces)}. Pass as many rows as the item "
                "has placeholders.",
                field="image_embeds",
            )
        return pieces

    def pixels_of_size(self, size: Size) -> int:
        """See `PictureInputs`."""
        pixels: int = self.config.vision_config.image_size**2
        return pixels

    def sizes(self) -> Iterable[Size]:
        """See `MediaInputs`."""
        return [(self.config.vision_config.image_size,) * 2]


class LlavaPictures(PicturesOfOneSize):
    """A row for each patch."""

    settings = ("size",)
    maps_by_default = True

    @classmethod
    def of_model(cls, ctx: InputContext, **settings: Any) -> MediaInputs:
        """With a Pixtral tower, pictures as Pixtral has them."""
        is_pixtral = tower_of(ctx.get_hf_config()) is PixtralVisionModel
        return PixtralPictures(ctx, **settings) if is_pixtral else cls(ctx, **settings)

    def pieces_of_size(self, size: Size) -> Pieces:
        """See `MediaInputs`."""
        num_rows = patches_per_side(self.config) ** 2 + tower_of(self.config).num_class_tokens
        return ((self.row_id, num_rows - drops_first_row(self.config)),)

    def size_of(self, item: Any) -> Size:
        """See `MediaInputs`; the mapper checks the item."""
        return ()


@takes_media(LlavaPictures)
class LlavaForConditionalGeneration(PictureLanguageModel):
    """Tower, projector and decoder."""

    names = WeightsMapper(
        orig_to_new_substr={"multi_modal_projector.linear_": "multi_modal_projector.fc"},
        orig_to_new_prefix={
            "model.language_model.": "language_model.model.",
            "model.": "",
            "lm_head.": "language_model.lm_head.",
        },
    )
    mm_host_kwargs = ("image_sizes",)

    @classmethod
    def unsuited_to(cls, hf_config: Any) -> str | None:
        """Why transformers must run a checkpoint: there is no class for its decoder, or for its tower if that may be of
        any kind."""
        kind = hf_config.vision_config.model_type
        if cls.make_tower is LlavaForConditionalGeneration.make_tower and kind not in TOWERS:
            return f"its vision tower {kind} has no class here"
        return missing_inner_model(hf_config.get_text_config())

    def __init__(self, *, config: EngineConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = config.model_config.hf_config
        self.vision_tower: Any = self.make_tower(config.quant_config, maybe_prefix(prefix, "vision_tower"))
        self.multi_modal_projector = self.make_projector(maybe_prefix(prefix, "multi_modal_projector"))
        self.language_model = init_registered_model(
            self.decoder_config(config), prefix=maybe_prefix(prefix, "language_model")
        )

    def decoder_config(self, config: EngineConfig) -> EngineConfig:
        """The decoder's configuration."""
        return language_config(config)

    def make_tower(self, quant_config: QuantizationConfig | None, prefix: str) -> nn.Module:
        """The vision tower."""
        return tower_of(self.config)(
            self.config.vision_config, feature_layers_of(self.config), quant_config, prefix=prefix
        )

    def make_projector(self, prefix: str) -> nn.Module:
        """The projector from the tower's rows to the decoder's."""
        width = self.config.get_text_config().hidden_size
        return EncoderMLP(
            self.config.vision_config.hidden_size * len(feature_layers_of(self.config)),
            width,
            self.config.projector_hidden_act,
            bias=self.config.multimodal_projector_bias,
            output_size=width,
            prefix=prefix,
        )

    def encode_pictures(self, pictures: Sequence[torch.Tensor], image_sizes: Any) -> Sequence[torch.Tensor]:
        """See `PictureLanguageModel`."""
        if isinstance(self.vision_tower, PixtralVisionModel):
            features, grids = self.vision_tower.encode(pictures, image_sizes)
            rows = self.multi_modal_projector(features)
            num_merged = self.vision_tower.square**2
            return torch.split(rows, [height * width // num_merged for _, height, width in grids])
        return list(self.project(torch.cat(list(pictures))))

    def project(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pictures or tiles of the tower's size `(B, channels, height, width)` to `(B, rows, text hidden_size)`."""
        features = self.vision_tower(pixel_values)[:, drops_first_row(self.config) :]
        rows: torch.Tensor = self.multi_modal_projector(features)
        return rows
