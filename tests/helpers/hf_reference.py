"""Greedy tokens by Hugging Face's own class on the prompt that Sensorium admitted.

The reference gets the expanded ids and the mapped tensors of the request, and runs its own `generate`. That
the ids and tensors equal those of Hugging Face's processors is shown apart from this.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import GenerationMixin

from sensorium.entrypoints.verification.reference import tiled_picture, two_way_types
from sensorium.messages import EngineRequest
from sensorium.multimodal.byte_patches import as_processed
from sensorium.multimodal.byte_pictures import joined
from tests.helpers.checkpoints import token_ids

TEMPORAL_PATCH_SIZE = 2
"""Of every checkpoint that takes pictures as bytes."""


def hf_inputs(request: EngineRequest, model: Any = None) -> dict[str, Any]:
    """The request as keyword arguments of Hugging Face's `generate`, a batch of one.

    `model`: its class may take clips as pictures, in the order of the prompt.
    """
    takes_clips = model is None or "pixel_values_videos" in inspect.signature(model.forward).parameters
    merged = {} if takes_clips else {"pixel_values_videos": "pixel_values"}
    ids = torch.tensor([list(request.prompt_token_ids)])
    [item] = request.media if any(each.cross_rows for each in request.media) else [None]
    if item is not None and "aspect_ratio_mask" in (item.kwargs or {}):
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **tiled_picture(request, item)}
    if item is not None:  # the prompt is the decoder's
        return {
            "decoder_input_ids": ids,
            **{name: torch.as_tensor(value) for name, value in (item.kwargs or {}).items()},
        }
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    by_name: dict[str, list[Any]] = {}
    for item in request.media:
        for name, value in as_processed(item.kwargs or {}, TEMPORAL_PATCH_SIZE).items():
            by_name.setdefault(merged.get(name, name), []).append(in_frames(value) if name in merged else value)
    inputs |= {name: joined(values) for name, values in by_name.items()}
    if request.two_way_spans:
        inputs["token_type_ids"] = two_way_types(request, ids)
    if "image_grid_thw" in inputs or "video_grid_thw" in inputs:
        types = torch.zeros_like(ids)
        types[ids == token_ids()["<|image_pad|>"]] = 1
        types[ids == token_ids()["<|video_pad|>"]] = 2
        inputs["mm_token_type_ids"] = types
    return inputs


def in_frames(clips: Any) -> torch.Tensor:
    """Clips `(..., frames, channels, height, width)` as so many pictures."""
    clip = torch.as_tensor(clips)
    return clip.flatten(0, clip.dim() - 4)


@torch.inference_mode()
def hf_greedy(model: Any, request: EngineRequest, num_tokens: int) -> list[int]:
    """`num_tokens` greedy tokens, past any end-of-sequence token."""
    inputs = hf_inputs(request, model)
    if "mm_token_type_ids" not in inspect.signature(model.forward).parameters:
        inputs.pop("mm_token_type_ids", None)
    model.generation_config.eos_token_id = None
    # Whisper's own adds tokens in front of those that it is given; what it adds is shown apart from this.
    output = GenerationMixin.generate(model, **inputs, max_new_tokens=num_tokens, do_sample=False)
    tokens: list[int] = output[0, len(request.prompt_token_ids) :].tolist()
    return tokens
