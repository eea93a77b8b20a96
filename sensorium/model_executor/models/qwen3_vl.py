"""Qwen3-VL and Qwen3-VL-MoE: images and videos of any size, with features of several tower layers in the decoder.

Reference: `transformers` `Qwen3VLForConditionalGeneration`, `Qwen3VLMoeForConditionalGeneration`. Placeholders: an
image's as in Qwen2-VL. A video's `<|video_pad|>` becomes, for each step of its grid in time, the time in seconds as
text, and the step's rows between `<|vision_start|>` and `<|vision_end|>`. The times are tokenized apart from the text
around them. Each step has a single picture's positions, since the text tells the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from sensorium.config import EngineConfig, rope_parameters
from sensorium.errors import InvalidRequestError, ModelError
from sensorium.inputs import INPUT_REGISTRY, InputContext, TokenInputs
from sensorium.model_executor.models.llama import LlamaForCausalLM
from sensorium.model_executor.models.media_common import Pieces, as_items, expand_items, language_config
from sensorium.model_executor.models.qwen2_5_vl import DEFAULT_FPS
from sensorium.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration
from sensorium.model_executor.models.qwen3 import Qwen3ForCausalLM
from sensorium.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM
from sensorium.model_executor.models.qwen3_vision import Qwen3VisionTransformer
from sensorium.model_executor.models.qwen_vl_inputs import Item, VisionInputs, grids_of
from sensorium.multimodal.hf_processors import cached_get_tokenizer
from sensorium.multimodal.mrope import positions_from_kwargs


def input_processor(
    ctx: InputContext,
    inputs: TokenInputs,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> TokenInputs:
    """Expand each item's placeholder by the item's size and a clip's times."""
    data = inputs.get("multi_modal_data") or {}
    expansions: dict[int, list[Pieces]] = {}
    names = {}
    for modality in ("image", "video"):
        if modality in data:
            kind = VisionInputs(ctx, modality, min_pixels=min_pixels, max_pixels=max_pixels)
            names[kind.token_id] = modality
            expansions[kind.token_id] = [_pieces(ctx, kind, item) for item in as_items(data[modality])]
    if expansions:
        prompt, most = inputs["prompt_token_ids"], ctx.model_config.max_model_len
        inputs["prompt_token_ids"], ranges = expand_items(prompt, expansions, names, most)
        inputs["multi_modal_placeholders"] = {names[token_id]: found for token_id, found in ranges.items()}
    return inputs


def _pieces(ctx: InputContext, kind: VisionInputs, item: Item) -> Pieces:
    """An item's tokens. Raises `InvalidRequestError` (a `ValueError`) for embeddings."""
    if isinstance(item, Mapping):
        raise InvalidRequestError(
            f"{kind.modality} data: got rows ({', '.join(sorted(item))}), expected a picture or a clip. This model "
            "adds features to several of its layers, so rows are not enough: send the media."
        )
    (grid,) = kind.grids(item)
    if kind.modality == "image":
        return ((kind.token_id, kind.num_rows(grid)),)
    steps, *_ = grid
    tokenizer = cached_get_tokenizer(
        ctx.model_config.tokenizer,
        trust_remote_code=ctx.model_config.trust_remote_code,
        revision=ctx.model_config.revision,
    )
    config, pieces = kind.config, []
    for time_s in step_times_s(item, steps, kind.processor.temporal_patch_size):
        ids: list[int] = tokenizer(f"<{time_s:.1f} seconds>", add_special_tokens=False)["input_ids"]
        pieces += [(token_id, 1) for token_id in ids]
        frame = (kind.token_id, kind.num_rows(grid) // steps)
        pieces += [(config.vision_start_token_id, 1), frame, (config.vision_end_token_id, 1)]
    return tuple(pieces)


def step_times_s(clip: Any, num_steps: int, depth: int) -> list[float]:
    """The time of each step of a clip's grid: halfway between its first frame and its last."""
    metadata = getattr(clip, "metadata", None) or {}
    indices = metadata.get("frames_indices")
    indices = list(range(len(clip))) if indices is None else [int(index) for index in indices]
    indices += [indices[-1]] * (num_steps * depth - len(indices))
    times = [index / (metadata.get("fps") or DEFAULT_FPS) for index in indices]
    return [(times[first] + times[first + depth - 1]) / 2 for first in range(0, num_steps * depth, depth)]


def interleaved_config(config: EngineConfig) -> EngineConfig:
    """The decoder's configuration, with rotary frequencies that alternate between the three axes.

    Raises:
        ModelError: It lacks the number of frequencies of each axis.
    """
    decoder = language_config(config)
    text = decoder.model_config.hf_config  # a copy
    if not decoder.model_config.uses_mrope:
        raise ModelError(
            "rope_parameters of text_config in config.json: got none with mrope_section, expected the frequencies of "
            "time, height and width. Add it."
        )
    text.rope_parameters = {**rope_parameters(text), "mrope_interleaved": True}
    return decoder


@INPUT_REGISTRY.register_input_processor(input_processor)
class Qwen3VLForConditionalGeneration(Qwen2VLForConditionalGeneration):
    """Tower and decoder; the rest is inherited from Qwen2-VL.

    Rows of media and text are several times as wide as the decoder: see `Decoder.forward`.
    """

    tower_class = Qwen3VisionTransformer
    visual: Qwen3VisionTransformer
    text_class: ClassVar[type[LlamaForCausalLM]] = Qwen3ForCausalLM

    def __init__(self, *, config: EngineConfig, prefix: str = "") -> None:
        super().__init__(config=config, prefix=prefix)
        self.mm_row_width = self.visual.row_width

    def make_language_model(self, config: EngineConfig, prefix: str) -> nn.Module:
        """See `Qwen2VLForConditionalGeneration`."""
        return self.text_class(config=interleaved_config(config), prefix=prefix)

    @classmethod
    def get_mrope_input_positions(
        cls, input_tokens: Sequence[int], hf_config: Any, mm_kwargs: Mapping[str, Any]
    ) -> tuple[np.ndarray[Any, np.dtype[np.int64]], int]:
        """See `Qwen2VLForConditionalGeneration`. Each step of a clip has a picture's positions."""
        steps = [(1, h, w) for t, h, w in grids_of(mm_kwargs.get("video_grid_thw")) for _ in range(t)]
        grids = {**mm_kwargs, "video_grid_thw": torch.tensor(steps, dtype=torch.int64).reshape(-1, 3)}
        return positions_from_kwargs(input_tokens, hf_config, grids)

    def embed_text(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`(num_tokens, (1 + levels) * hidden_size)`: embeddings, and zeros to be added to the outputs of layers."""
        embeddings = super().embed_text(input_ids)
        return F.pad(embeddings, (0, self.visual.row_width - embeddings.shape[-1]))


class Qwen3VLMoeForConditionalGeneration(Qwen3VLForConditionalGeneration):
    """Qwen3-VL with a mixture of experts."""

    text_class = Qwen3MoeForCausalLM
