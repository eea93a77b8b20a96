"""Whisper: a tower for windows of 30 seconds, and a decoder that attends to its rows by cross-attention.

Paper: Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision". Reference: `transformers`
`WhisperForConditionalGeneration`. A prompt is the decoder's start, such as
`<|startoftranscript|><|en|><|transcribe|><|notimestamps|>`, after preceding text if there is any. It has one sound and
no placeholder: every token sees all rows of the sound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig

from sensorium.attention import Attention, AttentionMetadata, AttentionType
from sensorium.checkpoint import read_json
from sensorium.config import EngineConfig, ModelConfig
from sensorium.errors import InvalidRequestError
from sensorium.inputs import INPUT_REGISTRY, DummyData, InputContext, TokenInputs
from sensorium.inputs.speech import SpeechTokens
from sensorium.inputs.transcription import TranscriptionStyle
from sensorium.model_executor.layers.activation import get_act_fn
from sensorium.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from sensorium.model_executor.layers.logits_processor import LogitsProcessor
from sensorium.model_executor.layers.quantization import QuantizationConfig
from sensorium.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sensorium.model_executor.model_loader.weight_utils import FUSED_WEIGHTS, load_fused_weights
from sensorium.model_executor.models.audio_common import Sound, checked, feature_extractor, heard_samples, max_audio_s
from sensorium.model_executor.models.interfaces import SupportsCrossAttention, SupportsMultiModal
from sensorium.model_executor.models.media_common import as_items, stacked
from sensorium.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from sensorium.model_executor.models.whisper_encoder import WhisperEncoder, with_key_biases
from sensorium.multimodal import MULTIMODAL_REGISTRY, MultiModalKwargs, PlaceholderRange
from sensorium.multimodal.audio import resample_audio
from sensorium.sequence import SequenceData

# Input processor and mapper


def input_processor(ctx: InputContext, inputs: TokenInputs) -> TokenInputs:
    """Check the prompt, and let its first token see the sound.

    Raises:
        InvalidRequestError: There isn't exactly one sound.
    """
    sounds = as_items((inputs.get("multi_modal_data") or {}).get("audio", []))
    if len(sounds) != 1:
        raise InvalidRequestError(
            f"got {len(sounds)} sounds, expected one, which the model writes down. Add it to multi_modal_data.",
            field="audio",
        )
    if not is_spectrogram(sounds[0]):
        checked(sounds[0], feature_extractor(ctx.model_config))
    begin, token_ids = ctx.get_hf_config().decoder_start_token_id, inputs["prompt_token_ids"]
    inputs["prompt_token_ids"] = token_ids if begin in token_ids else [begin, *token_ids]
    inputs["multi_modal_placeholders"] = {"audio": [PlaceholderRange(offset=0, length=1)]}
    return inputs


def dummy_data(ctx: InputContext, seq_len: int, mm_counts: Mapping[str, int]) -> DummyData:
    """A sound of full length."""
    extractor = feature_extractor(ctx.model_config)
    sound = (np.zeros(extractor.n_samples, dtype=np.float32), extractor.sampling_rate)
    tokens = SequenceData.from_prompt_token_counts((ctx.get_hf_config().decoder_start_token_id, 1), (0, seq_len - 1))
    return DummyData(tokens, {"audio": [sound]} if mm_counts["audio"] else None)


def is_spectrogram(sound: Any) -> bool:
    """Whether a sound is a piece of a `spectrogram`, `(mel bins, frames)`."""
    return isinstance(sound, np.ndarray) and sound.ndim == 2


def spectrogram(samples: np.ndarray[Any, Any], rate: float, extractor: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The spectrogram `(mel bins, frames)` of a sound: padded to a window, or of its own length if longer."""
    resampled = resample_audio(samples.astype(np.float32), orig_sr=rate, target_sr=extractor.sampling_rate)
    features = extractor(
        resampled,
        sampling_rate=extractor.sampling_rate,
        padding="max_length" if len(resampled) <= extractor.n_samples else "longest",
        truncation=False,
        return_tensors="np",
    )
    frames: np.ndarray[Any, np.dtype[np.float32]] = features["input_features"][0]
    return frames


def map_sounds(ctx: InputContext, data: Sound | list[Sound]) -> MultiModalKwargs:
    """`input_features` `(sounds, mel bins, frames)`, padded to the window.

    Raises:
        InvalidRequestError: A spectrogram of another size.
    """
    extractor, shape = feature_extractor(ctx.model_config), (ctx.get_hf_config().num_mel_bins, window_frames(ctx))
    windows = []
    for sound in as_items(data):
        if is_spectrogram(sound):
            frames = sound
        else:
            frames = spectrogram(heard_samples(sound, extractor), extractor.sampling_rate, extractor)
        if len(frames) != shape[0] or not 0 < frames.shape[1] <= shape[1]:
            raise InvalidRequestError(
                f"got a spectrogram of shape {frames.shape}, expected {shape}, or fewer frames. Cut it.", field="audio"
            )
        padded = np.zeros(shape, dtype=np.float32)
        padded[:, : frames.shape[1]] = frames
        windows.append(padded)
    return MultiModalKwargs({"input_features": torch.from_numpy(np.stack(windows))})


def window_frames(ctx: InputContext) -> int:
    """Frames of the tower's window; its second convolution halves them."""
    return 2 * max_audio_tokens(ctx)


def max_audio_tokens(ctx: InputContext) -> int:
    """The number of rows of any sound."""
    return int(ctx.get_hf_config().max_source_positions)


# The model


class WhisperSelfAttention(nn.Module):
    """Causal attention over the tokens."""

    def __init__(self, config: PretrainedConfig, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        size, num_heads = config.d_model, config.decoder_attention_heads
        head_size = size // num_heads
        self.qkv_proj = QKVParallelLinear(
            size, head_size, num_heads, quant_config=quant_config, prefix=f"{prefix}.qkv_proj"
        )
        self.out_proj = RowParallelLinear(size, size, quant_config=quant_config, prefix=f"{prefix}.out_proj")
        self.attn = Attention(self.qkv_proj.num_heads, head_size, head_size**-0.5, prefix=f"{prefix}.attn")

    def forward(
        self, hidden_states: torch.Tensor, kv_cache: torch.Tensor, attn_metadata: AttentionMetadata
    ) -> torch.Tensor:
        """`(num_tokens, d_model)` to the same."""
        query, key, value = self.qkv_proj.split_heads(self.qkv_proj(hidden_states)[0])
        attended = self.attn(query, key, value, kv_cache, attn_metadata)
        output: torch.Tensor = self.out_proj(attended)[0]
        return output


class WhisperCrossAttention(nn.Module):
    """Attention of the tokens to the rows of their sound."""

    def __init__(self, config: PretrainedConfig, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        size = config.d_model
        head_size = size // config.decoder_attention_heads
        self.q_proj = ColumnParallelLinear(size, size, quant_config=quant_config, prefix=f"{prefix}.q_proj")
        self.kv_proj = MergedColumnParallelLinear(
            size, [size, size], quant_config=quant_config, prefix=f"{prefix}.kv_proj"
        )
        self.out_proj = RowParallelLinear(size, size, quant_config=quant_config, prefix=f"{prefix}.out_proj")
        self.attn = Attention(
            self.q_proj.output_sizes[0] // head_size,
            head_size,
            head_size**-0.5,
            prefix=f"{prefix}.attn",
            attn_type=AttentionType.ENCODER_DECODER,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_outputs: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """`(num_tokens, d_model)` to the same; `encoder_outputs` `(num_rows, d_model)` are new rows, whose keys and
        values are cached."""
        key = value = None
        if encoder_outputs is not None:
            key, value = self.kv_proj(encoder_outputs)[0].chunk(2, dim=-1)
        attended = self.attn(self.q_proj(hidden_states)[0], key, value, kv_cache, attn_metadata)
        output: torch.Tensor = self.out_proj(attended)[0]
        return output


class WhisperDecoderLayer(nn.Module):
    """Attention to tokens, attention to the sound, and an MLP, each after a norm and with a residual."""

    def __init__(self, config: PretrainedConfig, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        size, inner = config.d_model, config.decoder_ffn_dim
        self.self_attn_layer_norm = nn.LayerNorm(size)
        self.self_attn = WhisperSelfAttention(config, quant_config, f"{prefix}.self_attn")
        self.encoder_attn_layer_norm = nn.LayerNorm(size)
        self.encoder_attn = WhisperCrossAttention(config, quant_config, f"{prefix}.encoder_attn")
        self.final_layer_norm = nn.LayerNorm(size)
        self.fc1 = ColumnParallelLinear(size, inner, quant_config=quant_config, prefix=f"{prefix}.fc1")
        self.fc2 = RowParallelLinear(inner, size, quant_config=quant_config, prefix=f"{prefix}.fc2")
        self.act_fn = get_act_fn(config.activation_function)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_outputs: torch.Tensor | None,
        kv_caches: Sequence[torch.Tensor],
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """`(num_tokens, d_model)` to the same. `kv_caches`: that of the tokens and that of the sound."""
        own, cross = kv_caches
        hidden_states = hidden_states + self.self_attn(self.self_attn_layer_norm(hidden_states), own, attn_metadata)
        normed = self.encoder_attn_layer_norm(hidden_states)
        hidden_states = hidden_states + self.encoder_attn(normed, encoder_outputs, cross, attn_metadata)
        normed = self.final_layer_norm(hidden_states)
        output: torch.Tensor = hidden_states + self.fc2(self.act_fn(self.fc1(normed)[0]))[0]
        return output


class WhisperDecoder(nn.Module):
    """Embeddings with learned positions, the layers, and a last norm."""

    renames = WeightsMapper(
        orig_to_new_substr={
            ".encoder_attn.k_proj.": ".encoder_attn.key.",
            ".encoder_attn.v_proj.": ".encoder_attn.value.",
        }
    )
    fused: ClassVar[Mapping[str, tuple[str, int | str]]] = {
        **FUSED_WEIGHTS,
        "key": ("kv_proj", 0),
        "value": ("kv_proj", 1),
    }

    def __init__(self, config: PretrainedConfig, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        size = config.d_model
        self.scale = math.sqrt(size) if config.scale_embedding else 1.0
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, size, prefix=f"{prefix}.embed_tokens")
        self.embed_positions = nn.Embedding(config.max_target_positions, size)
        self.layers = nn.ModuleList(
            WhisperDecoderLayer(config, quant_config, f"{prefix}.layers.{index}")
            for index in range(config.decoder_layers)
        )
        self.layer_norm = nn.LayerNorm(size)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: Sequence[torch.Tensor],
        attn_metadata: AttentionMetadata,
        encoder_outputs: torch.Tensor | None,
    ) -> torch.Tensor:
        """Hidden states `(num_tokens, d_model)`."""
        hidden_states = self.embed_tokens(input_ids) * self.scale + self.embed_positions(positions)
        for index, layer in enumerate(self.layers):
            caches = kv_caches[2 * index : 2 * index + 2]
            hidden_states = layer(hidden_states, encoder_outputs, caches, attn_metadata)
        normed: torch.Tensor = self.layer_norm(hidden_states)
        return normed

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill the decoder from a checkpoint's names, relative to it."""
        return load_fused_weights(self, self.renames.apply(with_key_biases(weights)), self.fused)


@MULTIMODAL_REGISTRY.register_input_mapper("audio", map_sounds)
@MULTIMODAL_REGISTRY.register_max_multimodal_tokens("audio", max_audio_tokens)
@INPUT_REGISTRY.register_dummy_data(dummy_data)
@INPUT_REGISTRY.register_input_processor(input_processor)
class WhisperForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsCrossAttention):
    """Tower, decoder and head."""

    names = WeightsMapper(orig_to_new_prefix={"model.": "", "proj_out.": "lm_head."})

    def __init__(self, *, config: EngineConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = hf_config = config.model_config.hf_config
        self.encoder = WhisperEncoder(hf_config, config.quant_config, prefix=maybe_prefix(prefix, "encoder"))
        self.decoder = WhisperDecoder(hf_config, config.quant_config, maybe_prefix(prefix, "decoder"))
        self.lm_head = ParallelLMHead(hf_config.vocab_size, hf_config.d_model, prefix=maybe_prefix(prefix, "lm_head"))
        if hf_config.tie_word_embeddings:
            self.lm_head.tie_weights(self.decoder.embed_tokens)
        self.logits_processor = LogitsProcessor(hf_config.vocab_size)

    @classmethod
    def get_num_encoder_rows(cls, model_config: ModelConfig, modality: str, kwargs: Mapping[str, Any]) -> int:
        """See `SupportsCrossAttention`. A sound is padded to the window with silence, which the model attends to,
        too."""
        del modality, kwargs
        return int(model_config.hf_config.max_source_positions)

    @classmethod
    def get_transcription_style(cls, model_config: ModelConfig) -> TranscriptionStyle:
        """See `SupportsTranscription`. It bounds sounds that aren't split into windows."""
        return TranscriptionStyle(max_audio_s=max_audio_s(model_config))

    @classmethod
    def get_speech_tokens(cls, model_config: ModelConfig) -> SpeechTokens:
        """See `SupportsTranscription`; most of it comes from `generation_config.json`."""
        config, generation = model_config.hf_config, read_json(Path(model_config.model) / "generation_config.json")
        languages = generation.get("lang_to_id") if generation.get("is_multilingual", True) else None
        return SpeechTokens(
            begin=config.decoder_start_token_id,
            end=config.eos_token_id,
            window_frames=2 * config.max_source_positions,
            max_prompt_tokens=config.max_target_positions // 2 - 1,
            no_times=generation.get("no_timestamps_token_id"),
            previous=generation.get("prev_sot_token_id"),
            languages=languages and {name.strip("<|>"): token_id for name, token_id in languages.items()},
            tasks=languages and generation.get("task_to_id"),
            max_first_time=generation.get("max_initial_timestamp_index"),
        )

    @classmethod
    def get_spectrogram(cls, model_config: ModelConfig, samples: Any, rate: float) -> Any:
        """See `SupportsTranscription`."""
        return spectrogram(samples, rate, feature_extractor(model_config))

    def get_multimodal_embeddings(self, input_features: Any = None, **kwargs: Any) -> list[torch.Tensor]:
        """Rows `(max_source_positions, d_model)` of each sound, given spectrograms `(..., mel bins, frames)`."""
        if input_features is None:
            return []
        features, num_rows = stacked(input_features, 2), self.config.max_source_positions
        rows = self.encoder.layer_norm(self.encoder(features, [2 * num_rows] * len(features)))
        return list(torch.split(rows, num_rows))

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: Sequence[torch.Tensor],
        attn_metadata: AttentionMetadata,
        intermediate_tensors: Any = None,
        encoder_outputs: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states `(num_tokens, d_model)`; `encoder_outputs`: see `SupportsCrossAttention`."""
        hidden_states: torch.Tensor = self.decoder(input_ids, positions, kv_caches, attn_metadata, encoder_outputs)
        return hidden_states

    def compute_logits(self, hidden_states: torch.Tensor, sampling_metadata: Any) -> torch.Tensor:
        """Logits `(num_rows, vocab_size)`."""
        logits: torch.Tensor = self.logits_processor(self.lm_head, hidden_states, sampling_metadata)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill all parts. If the head is tied to the embeddings, a checkpoint may have either or both."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.names)
