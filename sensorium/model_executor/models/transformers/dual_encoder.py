"""Models with a tower for texts and one for pictures, whose vectors can be compared: CLIP, SigLIP.

A prompt is one text or one picture. The towers are transformers' own modules. A picture has one row, its vector; each
row of a text has the text's vector.

Papers: Radford et al. 2021; Zhai et al. 2023. References: `transformers` `CLIPModel`, `SiglipModel`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from sensorium.attention import AttentionMetadata
from sensorium.config import EngineConfig, ModelConfig, ModelFeatures
from sensorium.errors import InvalidRequestError
from sensorium.inputs import INPUT_REGISTRY, DummyData, InputContext, TokenInputs, token_inputs
from sensorium.model_executor.models.interfaces import SupportsMultiModal
from sensorium.model_executor.models.media_common import stacked
from sensorium.model_executor.models.transformers.pooling import NothingKept, batches_of, padded_ids
from sensorium.model_executor.models.transformers.weights import load_pooling_model
from sensorium.multimodal import MULTIMODAL_REGISTRY
from sensorium.multimodal.inputs import PlaceholderRange
from sensorium.sequence import SequenceData

PLACEHOLDER = "<image>"
"""The placeholder of a picture in a prompt's text."""


def placeholder_id(model_config: ModelConfig) -> int:
    """The id of a picture's row. It is outside the vocabulary."""
    return model_config.vocab_size


def input_processor(ctx: InputContext, inputs: TokenInputs) -> TokenInputs:
    """One row for a picture; a text is padded to the tower's length if the model was trained so.

    Raises `InvalidRequestError` (a `ValueError`) for a picture with text.
    """
    ids, data = inputs["prompt_token_ids"], inputs.get("multi_modal_data")
    if data:
        text = inputs.get("prompt")
        rest = ids if text is None else text.replace(PLACEHOLDER, "").strip()
        if rest and rest != [placeholder_id(ctx.model_config)]:
            raise InvalidRequestError(
                "got a text beside a picture, expected one of them. This model has a vector for each: send them as two "
                "inputs.",
                field="prompt",
            )
        return token_inputs(
            [placeholder_id(ctx.model_config)],
            multi_modal_data=data,
            multi_modal_placeholders={"image": [PlaceholderRange(offset=0, length=1)]},
        )
    model_class = ctx.model_config.model_class
    if getattr(model_class, "pads_texts", False):
        text_config = ctx.model_config.hf_text_config
        ids = ids + [text_config.pad_token_id] * (text_config.max_position_embeddings - len(ids))
    return token_inputs(ids, prompt=inputs.get("prompt"))


def dummy_data(ctx: InputContext, _seq_len: int, _mm_counts: Mapping[str, int]) -> DummyData:
    """A picture of the tower's size."""
    from PIL import Image

    side = ctx.get_hf_config().vision_config.image_size
    picture = Image.new("RGB", (side, side))
    sequence = SequenceData.from_prompt_token_counts((placeholder_id(ctx.model_config), 1))
    return DummyData(sequence, {"image": [picture]})


@MULTIMODAL_REGISTRY.register_image_input_mapper()
@MULTIMODAL_REGISTRY.register_max_image_tokens(1)
@MULTIMODAL_REGISTRY.register_placeholder_tokens("image", lambda ctx: placeholder_id(ctx.model_config))
@MULTIMODAL_REGISTRY.register_placeholder_str("image", PLACEHOLDER)
@INPUT_REGISTRY.register_dummy_data(dummy_data)
@INPUT_REGISTRY.register_input_processor(input_processor)
class DualEncoder(nn.Module, SupportsMultiModal):
    """Two towers, and the projections of their outputs to one size."""

    pads_texts: ClassVar[bool] = False
    """Whether texts are always padded to the tower's length, and attention sees the padding."""

    def __init__(self, *, config: EngineConfig, hf_model: nn.Module) -> None:
        super().__init__()
        self.hf_model: Any = hf_model
        size = config.model_config.pooler.size
        assert size is not None, "the config says it"
        self._size = size
        self._pad_token_id = getattr(config.model_config.hf_text_config, "pad_token_id", None) or 0
        self.nothing_kept = NothingKept()

    @classmethod
    def load_from_checkpoint(cls, config: EngineConfig) -> DualEncoder:
        """The model with its checkpoint's weights; see `load_pooling_model`."""
        with torch.inference_mode():
            return cls(config=config, hf_model=load_pooling_model(config))

    def get_multimodal_embeddings(self, pixel_values: Any = None, **kwargs: Any) -> list[torch.Tensor]:
        """Each picture's vector `(1, size)`; pictures `(..., channels, height, width)`."""
        vectors = _pooled(self.hf_model.get_image_features(pixel_values=stacked(pixel_values, 3)))
        return list(vectors[:, None])

    def forward(
        self, input_ids: torch.Tensor, attn_metadata: AttentionMetadata, is_media: torch.Tensor | None = None
    ) -> torch.Tensor:
        """For each row its text's vector, `(num_tokens, size)`; zeros where `is_media` `(num_tokens,)`."""
        lens = list(attn_metadata.query_lens_host)
        texts = [ids.tolist() for ids in torch.split(input_ids, lens)]
        media = [False] * len(lens) if is_media is None else [bool(each[0]) for each in torch.split(is_media, lens)]
        wanted = [i for i, is_picture in enumerate(media) if not is_picture]
        vectors: dict[int, torch.Tensor] = {}
        for batch in batches_of([lens[i] for i in wanted], is_padded=True):
            places = [wanted[i] for i in batch]
            ids, mask = padded_ids([texts[i] for i in places], self._pad_token_id, input_ids.device)
            masks = {} if self.pads_texts else {"attention_mask": mask}
            vectors |= zip(places, _pooled(self.hf_model.get_text_features(input_ids=ids, **masks)), strict=True)
        nothing = next(self.hf_model.parameters()).new_zeros(self._size)
        return torch.cat([vectors.get(i, nothing).expand(length, -1) for i, length in enumerate(lens)])


class PaddedDualEncoder(DualEncoder):
    """A dual encoder whose texts are padded: SigLIP."""

    pads_texts = True


def dual_features(model_config: ModelConfig) -> ModelFeatures:
    """The features of a model with two towers."""
    ids = {"image": frozenset((placeholder_id(model_config),))}
    note = "one text or one picture to a prompt, each by its own tower of transformers"
    return ModelFeatures(
        "two towers", placeholder_token_ids=ids, max_item_rows={"image": 1}, whole_prompts=True, notes=(note,)
    )


def _pooled(output: Any) -> torch.Tensor:
    """The pooled output `(batch, size)`; older versions of transformers return only that."""
    vectors: torch.Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    return vectors
