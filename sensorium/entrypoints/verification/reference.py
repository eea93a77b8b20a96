"""What Hugging Face computes: its class, its weights, eager attention, one prompt after another."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sensorium.config import EngineConfig
from sensorium.errors import ModelError
from sensorium.messages import EngineRequest, MediaItem
from sensorium.model_executor.models.transformers.media_rows import on_device
from sensorium.model_executor.models.transformers.weights import load_hf_model
from sensorium.multimodal.byte_patches import as_processed
from sensorium.multimodal.byte_pictures import joined
from sensorium.multimodal.hf_items import is_of_processor, of_item
from sensorium.multimodal.mrope import token_id_of

_TOKEN_TYPES = {"image": 1, "video": 2, "audio": 3}
"""How processors of transformers tell tokens of media apart."""


@dataclass(frozen=True, slots=True, eq=False)
class Truth:
    """What one prompt should give."""

    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: npt.NDArray[np.float64]
    """`(prompt length, vocab_size)` of what may follow each token; minus infinity where it isn't known."""
    token_ids: tuple[int, ...]
    """Greedy tokens, past any end."""
    logprobs: npt.NDArray[np.float64]
    """`(num_new_tokens, vocab_size)`: what each was chosen from."""


class Reference:
    """A model of Hugging Face.

    Raises `ModelError` (a `TypeError`) if transformers has no such class, and what loading raises.
    """

    def __init__(self, config: EngineConfig) -> None:
        import transformers

        self._config = config.model_config
        if not self._config.trust_remote_code and not hasattr(transformers, self._config.architecture):
            raise ModelError(
                f"reference for {self._config.architecture}: got an architecture that transformers doesn't know, "
                "expected one that it has a class for. Compare with --baseline, or check the model by its own tests."
            )
        model: Any = load_hf_model(config)
        model.set_attn_implementation("eager")
        self.model = model
        self._device = torch.device(config.device_config.device)

    @torch.inference_mode()
    def ask(self, request: EngineRequest, num_new_tokens: int) -> Truth:
        """The truth about a prompt that an engine has admitted."""
        from transformers import GenerationMixin

        inputs = self._inputs(request)
        settings = self.model.generation_config
        settings.eos_token_id = settings.forced_eos_token_id = None
        settings.pad_token_id = 0
        settings.suppress_tokens = settings.begin_suppress_tokens = None
        # A model with an encoder may have a way of its own, which writes the decoder's prompt itself.
        is_decoders = "decoder_input_ids" in inputs
        generate: Any = partial(GenerationMixin.generate, self.model) if is_decoders else self.model.generate
        generated = generate(
            **inputs,
            max_new_tokens=num_new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        prompt_length = len(request.prompt_token_ids)
        return Truth(
            tuple(request.prompt_token_ids),
            log_softmax(self.model(**self._for_forward(inputs)).logits[0]),
            tuple(generated.sequences[0, prompt_length:].tolist()),
            log_softmax(torch.cat(list(generated.logits))),
        )

    def _inputs(self, request: EngineRequest) -> dict[str, Any]:
        """A request as keyword arguments of `generate`."""
        ids = torch.tensor([list(request.prompt_token_ids)], device=self._device)
        if self._config.hf_config.is_encoder_decoder:
            [item] = request.media
            kwargs = {name: value.to(self._device) for name, value in (item.kwargs or {}).items()}
            return {"decoder_input_ids": ids, **kwargs}
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for item in request.media:
            if item.cross_rows:
                return inputs | {name: value.to(self._device) for name, value in tiled_picture(request, item).items()}
        if any(map(is_of_processor, (item.kwargs or {} for item in request.media))):
            [item] = request.media
            return inputs | on_device(_over_prompt(item, ids.shape[1]), self._device, self._config.dtype)
        by_name: dict[str, list[Any]] = {}
        for item in request.media:
            kwargs = as_processed(item.kwargs or {}, self._frames_a_patch())
            for name, value in kwargs.items():
                by_name.setdefault(name, []).append(value)
        inputs |= self._as_taken({name: joined(values) for name, values in by_name.items()})
        names = inspect.signature(self.model.forward).parameters
        if "mm_token_type_ids" in names and request.media:
            inputs["mm_token_type_ids"] = self._token_types(ids)
        if "token_type_ids" in names and request.two_way_spans:
            inputs["token_type_ids"] = two_way_types(request, ids)
        return inputs

    def _as_taken(self, media: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """On the device, without what a plug-in's mapper makes for its own class alone.

        Clips go by the name of pictures to a class that doesn't tell them apart.
        """
        names = inspect.signature(self.model.forward).parameters
        if "pixel_values_videos" not in names:
            clips = media.pop("pixel_values_videos", None)
            if clips is not None:
                media["pixel_values"] = clips.flatten(0, -4)
        return {name: tensor.to(self._device) for name, tensor in media.items() if name in names}

    def _frames_a_patch(self) -> int:
        vision = getattr(self._config.hf_config, "vision_config", None)
        return int(getattr(vision, "temporal_patch_size", 1) or 1)

    def _token_types(self, ids: torch.Tensor) -> torch.Tensor:
        types = torch.zeros_like(ids)
        for modality, kind in _TOKEN_TYPES.items():
            token_id = token_id_of(self._config.hf_config, modality)
            if token_id is not None:
                types[ids == token_id] = kind
        return types

    def _for_forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The same for `forward`, with the positions that `generate` gives to a model of text."""
        names = inspect.signature(self.model.forward).parameters
        ids = inputs.get("input_ids")
        if ids is not None and "position_ids" in names and set(inputs) == {"input_ids", "attention_mask"}:
            inputs = inputs | {"position_ids": torch.arange(ids.shape[1], device=self._device)[None]}
        return {name: value for name, value in inputs.items() if name in names}


def two_way_types(request: EngineRequest, ids: torch.Tensor) -> torch.Tensor:
    """`token_type_ids` that make spans of a prompt see themselves both ways: 1 in pictures (Gemma 3), or 0 in a prefix
    (PaliGemma)."""
    types = torch.zeros_like(ids)
    for begin, end in request.two_way_spans:
        types[:, begin:end] = end - begin < ids.shape[1]
    return types


def tiled_picture(request: EngineRequest, item: MediaItem) -> dict[str, torch.Tensor]:
    """A picture for cross-attention, and which of its tiles each token sees, as transformers' `MllamaProcessor` says
    it: those that are there, from the picture's token on."""
    kwargs = item.kwargs or {}
    tiles = torch.as_tensor(kwargs["aspect_ratio_mask"])
    mask = torch.zeros(1, len(request.prompt_token_ids), 1, tiles.shape[-1], dtype=torch.int64)
    mask[:, item.span.end - 1 :] = tiles
    pixels = torch.as_tensor(kwargs["pixel_values"])
    return {
        "pixel_values": pixels.view(1, 1, *pixels.shape[-4:]),
        "aspect_ratio_ids": torch.as_tensor(kwargs["aspect_ratio_ids"]).view(1, 1),
        "aspect_ratio_mask": tiles.view(1, 1, -1),
        "cross_attention_mask": mask,
    }


def _over_prompt(item: MediaItem, num_tokens: int) -> dict[str, Any]:
    """What a processor made of an item alone, as it makes it of the prompt: zeros where the rest's tokens stand."""
    tensors, is_whole = of_item(item.kwargs or {})
    if is_whole:
        return tensors
    begin, end = item.span.offset, item.span.end
    for name, value in tensors.items():
        if isinstance(value, torch.Tensor) and value.shape == (1, end - begin):
            tensors[name] = value.new_zeros(1, num_tokens)
            tensors[name][:, begin:end] = value
    return tensors


def spread_of(logprobs: npt.NDArray[np.float64]) -> float:
    """The standard deviation within rows of what is known, which errors are measured by."""
    deviations = [row[np.isfinite(row)].std() for row in logprobs if np.isfinite(row).any()]
    return max(float(np.mean(deviations)), 1e-6) if deviations else 1.0


def log_softmax(logits: torch.Tensor) -> npt.NDArray[np.float64]:
    """Log probabilities of each row."""
    result: npt.NDArray[np.float64] = torch.log_softmax(logits.double(), dim=-1).cpu().numpy()
    return result
