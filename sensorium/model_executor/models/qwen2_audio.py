"""Qwen2-Audio: Whisper's tower, pooled to a row per 40 ms, and Qwen2.

Paper: Chu et al. 2024, "Qwen2-Audio Technical Report". Reference: `transformers` `Qwen2AudioForConditionalGeneration`.
Placeholders: each `<|AUDIO|>` token becomes as many as the sound has rows, at most 750 for 30 s; what is longer is cut
off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sensorium.config import EngineConfig, ModelConfig
from sensorium.errors import InvalidRequestError
from sensorium.inputs import INPUT_REGISTRY, DummyData, InputContext, TokenInputs
from sensorium.inputs.transcription import TranscriptionStyle
from sensorium.model_executor.layers.linear import ReplicatedLinear
from sensorium.model_executor.models.audio_common import (
    Sound,
    checked,
    feature_extractor,
    heard_samples,
    max_audio_s,
)
from sensorium.model_executor.models.media_common import (
    as_items,
    check_embeddings,
    expand_placeholders,
    language_config,
    stacked,
)
from sensorium.model_executor.models.media_language_model import MediaLanguageModel
from sensorium.model_executor.models.qwen2 import Qwen2ForCausalLM
from sensorium.model_executor.models.utils import WeightsMapper, maybe_prefix
from sensorium.model_executor.models.whisper_encoder import WhisperEncoder, rows_of_frames
from sensorium.multimodal import MULTIMODAL_REGISTRY, MultiModalKwargs
from sensorium.sequence import SequenceData

# Input processor and mapper


def num_rows_of(num_frames: int) -> int:
    """Decoder rows of a sound with this many frames of 10 ms."""
    return (rows_of_frames(num_frames) - 2) // 2 + 1


def num_rows_of_sound(sound: Sound, ctx: InputContext) -> int:
    """Decoder rows of a sound.

    Raises:
        InvalidRequestError: It is too short to have any.
    """
    if isinstance(sound, torch.Tensor):
        return len(check_embeddings(sound, None, ctx.get_hf_config().get_text_config().hidden_size, "audio_embeds"))
    extractor = feature_extractor(ctx.model_config)
    samples, rate = checked(sound, extractor)
    num_samples = math.ceil(len(samples) * extractor.sampling_rate / rate)
    num_rows = num_rows_of(min(math.ceil(num_samples / extractor.hop_length), extractor.nb_max_frames))
    if num_rows < 1:
        raise InvalidRequestError(
            f"audio too short: got {num_samples} samples at {extractor.sampling_rate} Hz, expected at least "
            f"{2 * extractor.hop_length + 1}. Send a longer sound."
        )
    return num_rows


def input_processor(ctx: InputContext, inputs: TokenInputs) -> TokenInputs:
    """Repeat each audio token once per row."""
    data = inputs.get("multi_modal_data") or {}
    if "audio" not in data:
        return inputs
    sounds, token_id = as_items(data["audio"]), ctx.get_hf_config().audio_token_id
    counts = [num_rows_of_sound(sound, ctx) for sound in sounds]
    token_ids, ranges = expand_placeholders(
        inputs["prompt_token_ids"], {token_id: counts}, {token_id: "audio"}, ctx.model_config.max_model_len
    )
    inputs["prompt_token_ids"] = token_ids
    inputs["multi_modal_placeholders"] = {"audio": ranges[token_id]}
    return inputs


def dummy_data(ctx: InputContext, seq_len: int, mm_counts: Mapping[str, int]) -> DummyData:
    """As many sounds of full length as the limit allows, then zeros."""
    extractor, num_sounds = feature_extractor(ctx.model_config), mm_counts["audio"]
    num_tokens = num_sounds * max_audio_tokens(ctx)
    tokens = SequenceData.from_prompt_token_counts(
        (ctx.get_hf_config().audio_token_id, num_tokens), (0, max(seq_len - num_tokens, 0))
    )
    sound = (np.zeros(extractor.n_samples, dtype=np.float32), extractor.sampling_rate)
    return DummyData(tokens, {"audio": [sound] * num_sounds} if num_sounds else None)


def map_sounds(ctx: InputContext, data: Sound | list[Sound]) -> MultiModalKwargs:
    """`input_features` `(sounds, mel bins, frames)` with `feature_attention_mask` `(sounds, frames)`, or given rows."""
    sounds = as_items(data)
    if any(isinstance(sound, torch.Tensor) for sound in sounds):
        return MultiModalKwargs({"audio_embeds": sounds})
    extractor = feature_extractor(ctx.model_config)
    features = extractor(
        [heard_samples(sound, extractor) for sound in sounds],
        sampling_rate=extractor.sampling_rate,
        return_attention_mask=True,
        padding="max_length",
        return_tensors="pt",
    )
    return MultiModalKwargs(
        {"input_features": features["input_features"], "feature_attention_mask": features["attention_mask"]}
    )


def max_audio_tokens(ctx: InputContext) -> int:
    """Rows of a sound of full length."""
    return num_rows_of(feature_extractor(ctx.model_config).nb_max_frames)


# The model


class Qwen2AudioEncoder(WhisperEncoder):
    """Whisper's tower; pairs of rows are averaged before the last norm."""

    def forward(self, features: torch.Tensor, num_frames: Sequence[int]) -> torch.Tensor:
        """The rows of the sounds, concatenated, `(sum of num_rows_of(n), d_model)`."""
        hidden_states = super().forward(features, num_frames)
        parts = torch.split(hidden_states, [rows_of_frames(each) for each in num_frames])
        even = [part[: len(part) // 2 * 2] for part in parts]  # a last row without a partner is dropped
        pooled = torch.cat(even).view(-1, 2, hidden_states.shape[-1]).mean(dim=1)
        rows: torch.Tensor = self.layer_norm(pooled)
        return rows


@MULTIMODAL_REGISTRY.register_input_mapper("audio", map_sounds)
@MULTIMODAL_REGISTRY.register_max_multimodal_tokens("audio", max_audio_tokens)
@MULTIMODAL_REGISTRY.register_placeholder_tokens("audio", lambda ctx: ctx.get_hf_config().audio_token_id)
@MULTIMODAL_REGISTRY.register_placeholder_str("audio", lambda i: f"Audio {i}: <|audio_bos|><|AUDIO|><|audio_eos|>\n")
@INPUT_REGISTRY.register_dummy_data(dummy_data)
@INPUT_REGISTRY.register_input_processor(input_processor)
class Qwen2AudioForConditionalGeneration(MediaLanguageModel):
    """Tower, projector and decoder."""

    names = WeightsMapper(
        orig_to_new_substr={"multi_modal_projector.linear.": "multi_modal_projector."},
        orig_to_new_prefix={
            "language_model.model.model.": "language_model.model.",  # as transformers 5.17 saves it
            "model.language_model.": "language_model.model.",
            "model.": "",
            "lm_head.": "language_model.lm_head.",
        },
    )
    mm_host_kwargs = ("feature_attention_mask",)

    def __init__(self, *, config: EngineConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = hf_config = config.model_config.hf_config
        self.audio_tower = Qwen2AudioEncoder(
            hf_config.audio_config, config.quant_config, prefix=maybe_prefix(prefix, "audio_tower")
        )
        self.multi_modal_projector = ReplicatedLinear(
            hf_config.audio_config.d_model,
            hf_config.get_text_config().hidden_size,
            prefix=maybe_prefix(prefix, "multi_modal_projector"),
        )
        self.language_model = Qwen2ForCausalLM(
            config=language_config(config), prefix=maybe_prefix(prefix, "language_model")
        )

    @classmethod
    def get_transcription_style(cls, model_config: ModelConfig) -> TranscriptionStyle:
        """See `SupportsTranscription`."""
        return TranscriptionStyle(max_audio_s=max_audio_s(model_config))

    def placeholder_token_ids(self) -> list[int]:
        """See `MediaLanguageModel`."""
        return [self.config.audio_token_id]

    def encode_media(
        self, input_features: Any = None, feature_attention_mask: Any = None, audio_embeds: Any = None, **kwargs: Any
    ) -> dict[int, Sequence[torch.Tensor]]:
        """See `MediaLanguageModel`; spectrograms `(..., mel bins, frames)` with their masks, or given rows."""
        token_id = self.config.audio_token_id
        if audio_embeds is not None:
            return {token_id: given_rows(audio_embeds)}
        if input_features is None:
            return {}
        num_frames = stacked(feature_attention_mask, 1).sum(-1).tolist()
        rows = self.multi_modal_projector(self.audio_tower(stacked(input_features, 2), num_frames))[0]
        return {token_id: torch.split(rows, [num_rows_of(each) for each in num_frames])}


def given_rows(embeds: Any) -> list[torch.Tensor]:
    """The rows of each sound from a batch, in which their numbers may differ."""
    if isinstance(embeds, torch.Tensor):
        return list(stacked(embeds, 2))
    return [rows for each in embeds for rows in given_rows(each)]
