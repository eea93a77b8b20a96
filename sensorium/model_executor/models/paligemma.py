"""PaliGemma and PaliGemma 2: a SigLIP tower, a linear layer, and Gemma's decoder with bidirectional attention over the
prompt.

Papers: Beyer et al. 2024, "PaliGemma: A versatile 3B VLM for transfer", section 3.1; Steiner et al. 2024, "PaliGemma
2". Reference: `transformers` `PaliGemmaForConditionalGeneration`. Placeholders: each `<image>` token becomes as many as
the tower has patches. A prompt is pictures, the token that begins a text, the text, and a line end. Everything but the
text is added if it is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sensorium.attention import AttentionMetadata
from sensorium.config import EngineConfig, ModelConfig
from sensorium.model_executor.layers.linear import ReplicatedLinear
from sensorium.model_executor.layers.quantization import QuantizationConfig
from sensorium.model_executor.models.gemma3 import num_line_ends
from sensorium.model_executor.models.llava import LlavaForConditionalGeneration, PicturesOfOneSize, patches_per_side
from sensorium.model_executor.models.media_common import Pieces
from sensorium.model_executor.models.media_inputs import Size, takes_media
from sensorium.model_executor.models.siglip import SiglipVisionModel
from sensorium.spans import WHOLE_PROMPT


class PaliGemmaPictures(PicturesOfOneSize):
    """Every picture takes a row for each patch of the tower."""

    placeholder = "<image>"

    def prompt(self, token_ids: Sequence[int], num_items: int) -> Sequence[int]:
        """See `MediaInputs`: adds missing placeholders at the start, and the begin and end of the text."""
        begin = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        head, text = self._parts(list(token_ids))
        if head and begin and text[:1] == begin:
            return token_ids
        if not head:
            head, text = [self.row_id] * num_items, text[len(begin) :] if text[:1] == begin else text
        elif head[:1] == begin:
            head = head[1:]
        return [*head, *begin, *self._ended(text)]

    def _parts(self, token_ids: list[int]) -> tuple[list[int], list[int]]:
        """The tokens up to the last placeholder, and those after it."""
        last = max((at for at, each in enumerate(token_ids) if each == self.row_id), default=-1)
        return token_ids[: last + 1], token_ids[last + 1 :]

    def _ended(self, text: list[int]) -> list[int]:
        """A text with a line end added, which is tokenized together with line ends before it."""
        num_ends = 0
        while text and (count := num_line_ends(self.tokenizer, text[-1])):
            text, num_ends = text[:-1], num_ends + count
        return [*text, *self.tokenizer.encode("\n" * (num_ends + 1), add_special_tokens=False)]

    def pieces_of_size(self, size: Size) -> Pieces:
        """See `MediaInputs`."""
        return ((self.row_id, patches_per_side(self.config) ** 2),)


class PaliGemmaProjector(nn.Module):
    """A linear layer."""

    def __init__(self, hf_config: Any, prefix: str) -> None:
        super().__init__()
        width = hf_config.vision_config.hidden_size
        self.linear = ReplicatedLinear(width, hf_config.projection_dim, prefix=f"{prefix}.linear")

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(B, patches, hidden_size)` of the tower to `(B, patches, hidden_size)` of the decoder."""
        return self.linear.forward(features)[0]


@takes_media(PaliGemmaPictures)
class PaliGemmaForConditionalGeneration(LlavaForConditionalGeneration):
    """Tower, projector and decoder."""

    @classmethod
    def get_two_way_spans(cls, _model_config: ModelConfig) -> list[str]:
        """See `SupportsTwoWaySpans`."""
        return [WHOLE_PROMPT]

    def decoder_config(self, config: EngineConfig) -> EngineConfig:
        """See `LlavaForConditionalGeneration`: this class declares two-way spans, so the decoder's config must not."""
        text = super().decoder_config(config)
        text.model_config.hf_config.use_bidirectional_attention = False
        return text

    def make_tower(self, quant_config: QuantizationConfig | None, prefix: str) -> SiglipVisionModel:
        """See `LlavaForConditionalGeneration`."""
        return SiglipVisionModel(self.config.vision_config, None, quant_config, prefix=prefix)

    def make_projector(self, prefix: str) -> nn.Module:
        """See `LlavaForConditionalGeneration`."""
        return PaliGemmaProjector(self.config, prefix)

    def project(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """See `LlavaForConditionalGeneration`."""
        rows: torch.Tensor = self.multi_modal_projector(self.vision_tower(pixel_values))
        return rows

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        kv_caches: Sequence[torch.Tensor],
        attn_metadata: AttentionMetadata,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """See `MediaLanguageModel`; the first position is 1."""
        rest = (kv_caches, attn_metadata, intermediate_tensors, inputs_embeds)
        return super().forward(input_ids, positions + 1, *rest, **kwargs)
