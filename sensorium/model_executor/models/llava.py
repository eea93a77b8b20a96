"""LLaVA-1.5: a CLIP or SigLIP tower, two linear layers, and any registered decoder.

Paper: Liu et al. 2023, "Improved Baselines with Visual Instruction Tuning". Reference: `transformers`
`LlavaForConditionalGeneration`.
Placeholders: each `<image>` token becomes as many as the tower has patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from sensorium.config import EngineConfig
from sensorium.errors import ModelError
from sensorium.inputs import INPUT_REGISTRY, DummyData, InputContext, TokenInputs
from sensorium.model_executor.layers.encoder import EncoderMLP
from sensorium.model_executor.models.clip import CLIPVisionModel
from sensorium.model_executor.models.media_common import (
    as_items,
    check_embeddings,
    expand_placeholders,
    language_config,
    stacked,
)
from sensorium.model_executor.models.media_language_model import MediaLanguageModel
from sensorium.model_executor.models.siglip import SiglipVisionModel
from sensorium.model_executor.models.utils import WeightsMapper, init_registered_model, maybe_prefix
from sensorium.multimodal import MULTIMODAL_REGISTRY
from sensorium.sequence import SequenceData

TOWERS: dict[str, type[CLIPVisionModel | SiglipVisionModel]] = {
    "clip_vision_model": CLIPVisionModel,
    "siglip_vision_model": SiglipVisionModel,
}


def tower_of(hf_config: Any) -> type[CLIPVisionModel | SiglipVisionModel]:
    """The class of the config's vision tower."""
    model_type = hf_config.vision_config.model_type
    if model_type not in TOWERS:
        raise ModelError(f"vision tower of LLaVA: got {model_type!r}, expected one of {sorted(TOWERS)}.")
    return TOWERS[model_type]


def drops_first_row(hf_config: Any) -> int:
    """1 if the tower's first row, CLIP's class token, is left out, and 0 otherwise."""
    return int(hf_config.vision_feature_select_strategy == "default")


def rows_per_image(ctx: InputContext) -> int:
    """Decoder rows of an image, of whatever size."""
    hf_config = ctx.get_hf_config()
    vision = hf_config.vision_config
    num_rows: int = (vision.image_size // vision.patch_size) ** 2 + tower_of(hf_config).num_class_tokens
    return num_rows - drops_first_row(hf_config)


def input_processor(ctx: InputContext, inputs: TokenInputs) -> TokenInputs:
    """Repeat each image token once per row."""
    data = inputs.get("multi_modal_data") or {}
    if "image" not in data:
        return inputs
    token_id, num_rows = ctx.get_hf_config().image_token_id, rows_per_image(ctx)
    counts = [num_images_of(item, num_rows, ctx) for item in as_items(data["image"])]
    token_ids, ranges = expand_placeholders(
        inputs["prompt_token_ids"],
        {token_id: [num_rows] * sum(counts)},
        {token_id: "image"},
        ctx.model_config.max_model_len,
    )
    inputs["prompt_token_ids"] = token_ids
    if len(ranges[token_id]) == len(counts):  # otherwise an item has several ranges, which are found by their tokens
        inputs["multi_modal_placeholders"] = {"image": ranges[token_id]}
    return inputs


def num_images_of(item: Any, num_rows: int, ctx: InputContext) -> int:
    """1; for given rows `(images, rows, hidden_size)` the number of images."""
    if not isinstance(item, torch.Tensor):
        return 1
    num_images = len(item) if item.dim() == 3 else 1
    check_embeddings(item, num_images * num_rows, ctx.get_hf_config().get_text_config().hidden_size, "image_embeds")
    return num_images


def dummy_data(ctx: InputContext, seq_len: int, mm_counts: Mapping[str, int]) -> DummyData:
    """As many images as the limit allows, then zeros."""
    num_images, size = mm_counts["image"], ctx.get_hf_config().vision_config.image_size
    num_tokens = rows_per_image(ctx) * num_images
    tokens = SequenceData.from_prompt_token_counts(
        (ctx.get_hf_config().image_token_id, num_tokens), (0, max(seq_len - num_tokens, 0))
    )
    return DummyData(tokens, {"image": [Image.new("RGB", (size, size))] * num_images} if num_images else None)


@MULTIMODAL_REGISTRY.register_image_input_mapper()
@MULTIMODAL_REGISTRY.register_max_image_tokens(rows_per_image)
@MULTIMODAL_REGISTRY.register_placeholder_tokens("image", lambda ctx: ctx.get_hf_config().image_token_id)
@MULTIMODAL_REGISTRY.register_placeholder_str("image", "<image>")
@INPUT_REGISTRY.register_dummy_data(dummy_data)
@INPUT_REGISTRY.register_input_processor(input_processor)
class LlavaForConditionalGeneration(MediaLanguageModel):
    """Tower, projector and decoder."""

    names = WeightsMapper(
        orig_to_new_substr={"multi_modal_projector.linear_": "multi_modal_projector.fc"},
        orig_to_new_prefix={
            "model.language_model.": "language_model.model.",
            "model.": "",
            "lm_head.": "language_model.lm_head.",
        },
    )

    def __init__(self, *, config: EngineConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = hf_config = config.model_config.hf_config
        layers = hf_config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else list(layers)
        self.vision_tower = tower_of(hf_config)(
            hf_config.vision_config, layers, config.quant_config, prefix=maybe_prefix(prefix, "vision_tower")
        )
        width = hf_config.get_text_config().hidden_size
        self.multi_modal_projector = EncoderMLP(
            hf_config.vision_config.hidden_size * len(layers),
            width,
            hf_config.projector_hidden_act,
            bias=hf_config.multimodal_projector_bias,
            output_size=width,
            prefix=maybe_prefix(prefix, "multi_modal_projector"),
        )
        self.language_model = init_registered_model(
            language_config(config), prefix=maybe_prefix(prefix, "language_model")
        )

    def placeholder_token_ids(self) -> list[int]:
        """See `MediaLanguageModel`."""
        return [self.config.image_token_id]

    def encode_media(
        self, pixel_values: Any = None, image_embeds: Any = None, **kwargs: Any
    ) -> dict[int, Sequence[torch.Tensor]]:
        """See `MediaLanguageModel`; images `(..., channels, image_size, image_size)`, or given rows."""
        if image_embeds is not None:
            return {self.config.image_token_id: list(stacked(image_embeds, 2))}
        if pixel_values is None:
            return {}
        features = self.vision_tower(stacked(pixel_values, 3))
        return {
            self.config.image_token_id: list(self.multi_modal_projector(features[:, drops_first_row(self.config) :]))
        }
