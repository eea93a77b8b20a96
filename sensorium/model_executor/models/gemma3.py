"""Gemma 3 with pictures: a SigLIP tower whose patches are averaged in squares, a linear layer, and Gemma 3's decoder.

Paper: Gemma team 2025, "Gemma 3 Technical Report", section 2.1. Reference: `transformers`
`Gemma3ForConditionalGeneration`, without its "pan and scan", which is off by default. Placeholders: each
`<start_of_image>` becomes an empty line, a begin token, `mm_tokens_per_image` rows, an end token and an empty line. The
rows of a picture see one another both ways.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from sensorium.config import EngineConfig, ModelConfig
from sensorium.errors import UnsupportedFeatureError
from sensorium.model_executor.layers.layernorm import ZeroCenteredRMSNorm
from sensorium.model_executor.layers.parameters import new_parameter
from sensorium.model_executor.layers.quantization import QuantizationConfig
from sensorium.model_executor.models.llava import LlavaForConditionalGeneration, PicturesOfOneSize, patches_per_side
from sensorium.model_executor.models.media_common import Pieces
from sensorium.model_executor.models.media_inputs import Size, takes_media
from sensorium.model_executor.models.siglip import SiglipVisionModel


def between_lines(token_ids: Iterable[int], mark: int, item: Sequence[int], tokenizer: Any) -> Iterator[int]:
    """A prompt in which an item replaces each mark, with two more line ends before and after it.

    A run of line ends is one token or a few, so the whole run is tokenized anew: in `"a\
    <mark>"` it is three line ends before the item.
    """
    run: list[int] = []
    num_ends = num_more = 0  # in the current run, and to be added to it
    for token_id in (*token_ids, None):
        if token_id is not None and (count := num_line_ends(tokenizer, token_id)):
            run.append(token_id)
            num_ends += count
            continue
        num_more += 2 if token_id == mark else 0
        yield from tokenizer.encode("\n" * (num_ends + num_more), add_special_tokens=False) if num_more else run
        if token_id is not None:
            yield from item if token_id == mark else (token_id,)
        run, num_ends, num_more = [], 0, 2 if token_id == mark else 0


@lru_cache(maxsize=1 << 14)
def num_line_ends(tokenizer: Any, token_id: int) -> int:
    """The number of line ends of a token; 0 if it has anything else."""
    text: str = tokenizer.decode([token_id])
    return 0 if text.strip("\n") else len(text)


class Gemma3Pictures(PicturesOfOneSize):
    """Every picture takes the same number of rows, between markers and empty lines."""

    placeholder = "<start_of_image>"

    def prompt(self, token_ids: Sequence[int], _num_items: int) -> Sequence[int]:
        """See `MediaInputs`: adds markers and lines around each item's one token."""
        if self.row_id in token_ids:
            return token_ids
        begin, end = self.config.boi_token_id, self.config.eoi_token_id
        return list(between_lines(token_ids, begin, (begin, self.row_id, end), self.tokenizer))

    def pieces_of_size(self, size: Size) -> Pieces:
        """See `MediaInputs`."""
        return ((self.row_id, self.config.mm_tokens_per_image),)

    def map(self, items: Sequence[Any]) -> Any:
        """See `PictureInputs`."""
        if getattr(self.processor, "do_pan_and_scan", None):
            raise UnsupportedFeatureError(
                "do_pan_and_scan of the checkpoint's image processor: got true, expected false. Set it to false in "
                "preprocessor_config.json, so that a picture is seen as a whole."
            )
        return super().map(items)


class Gemma3Projector(nn.Module):
    """Averages squares of patches, then a norm and a linear layer: a decoder row for each square."""

    def __init__(self, hf_config: Any) -> None:
        super().__init__()
        vision = hf_config.vision_config
        self.patches_per_side = patches_per_side(hf_config)
        self.square = self.patches_per_side // int(hf_config.mm_tokens_per_image**0.5)
        self.mm_soft_emb_norm = ZeroCenteredRMSNorm(vision.hidden_size, eps=vision.layer_norm_eps)
        self.mm_input_projection_weight = new_parameter(vision.hidden_size, hf_config.get_text_config().hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(B, patches, hidden_size)` of the tower to `(B, rows, hidden_size)` of the decoder."""
        side = self.patches_per_side
        grid = features.transpose(1, 2).reshape(len(features), -1, side, side)
        pooled = F.avg_pool2d(grid, self.square).flatten(2).transpose(1, 2)
        return self.mm_soft_emb_norm.forward(pooled.contiguous()) @ self.mm_input_projection_weight


@takes_media(Gemma3Pictures)
class Gemma3ForConditionalGeneration(LlavaForConditionalGeneration):
    """Tower, projector and decoder."""

    def decoder_config(self, config: EngineConfig) -> EngineConfig:
        """See `LlavaForConditionalGeneration`: with pictures, the reference doesn't cap logits."""
        text = super().decoder_config(config)
        text.model_config.hf_config.final_logit_softcapping = None
        return text

    def make_tower(self, quant_config: QuantizationConfig | None, prefix: str) -> SiglipVisionModel:
        """See `LlavaForConditionalGeneration`."""
        return SiglipVisionModel(self.config.vision_config, None, quant_config, prefix=prefix)

    def make_projector(self, prefix: str) -> nn.Module:
        """See `LlavaForConditionalGeneration`."""
        return Gemma3Projector(self.config)

    @classmethod
    def get_two_way_spans(cls, _model_config: ModelConfig) -> list[str]:
        """See `SupportsTwoWaySpans`."""
        return ["image"]

    def project(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """See `LlavaForConditionalGeneration`."""
        rows: torch.Tensor = self.multi_modal_projector(self.vision_tower(pixel_values))
        return rows
