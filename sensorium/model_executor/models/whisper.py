"""Whisper: a tower that hears 30 seconds, and a decoder that attends to its rows by cross-attention.

Paper: Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision". Reference: `transformers`
`WhisperForConditionalGeneration`. A prompt holds what the decoder begins with, such as
`<|startoftranscript|><|en|><|transcribe|><|notimestamps|>`, behind text that came before if there is any. It goes with
one sound, of which every token sees all rows, and no token stands for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig

from sensorium.attention import Attention, AttentionMetadata, AttentionType
from sensorium.config import EngineConfig, ModelConfig
from sensorium.errors import InvalidRequestError
from sensorium.inputs import INPUT_REGISTRY, DummyData, InputContext, TokenInputs
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
from sensorium.model_executor.models.audio_common import Sound, checked, feature_extractor, heard_samples
from sensorium.model_executor.models.interfaces import SupportsCrossAttention, SupportsMultiModal
from sensorium.model_executor.models.media_common import as_items, stacked
from sensorium.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from sensorium.model_executor.models.whisper_encoder import WhisperEncoder, with_key_biases
from sensorium.multimodal import MULTIMODAL_REGISTRY, MultiModalKwargs, PlaceholderRange
from sensorium.sequence import SequenceData

# Input processor and mapper


def input_processor(ctx: InputContext, inputs: TokenInputs) -> TokenInputs:
    """Let the prompt hold what the decoder begins with, and its first token see the sound.

    Raises:
        InvalidRequestError: There is not one sound.
    """
    sounds = as_items((inputs.get("multi_modal_data") or {}).get("audio", []))
    if len(sounds) != 1:
        raise InvalidRequestError(
            f"audio: got {len(sounds)} sounds, expected one, which the model writes down. Add it to multi_modal_data."
        )
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


def map_sounds(ctx: InputContext, data: Sound | list[Sound]) -> MultiModalKwargs:
    """`input_features` `(sounds, mel bins, frames)`, of full length."""
    extractor = feature_extractor(ctx.model_config)
    features = extractor(
        [heard_samples(sound, extractor) for sound in as_items(data)],
        sampling_rate=extractor.sampling_rate,
        padding="max_length",
        return_tensors="pt",
    )
    return MultiModalKwargs({"input_features": features["input_features"]})


def max_audio_tokens(ctx: InputContext) -> int:
    """Rows of any sound."""
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
        """`(num_tokens, d_model)` to the same; `encoder_outputs` `(num_rows, d_model)` are those to be kept."""
        key = value = None
        if encoder_outputs is not None:
            key, value = self.kv_proj(encoder_outputs)[0].chunk(2, dim=-1)
        attended = self.attn(self.q_proj(hidden_states)[0], key, value, kv_cache, attn_metadata)
        output: torch.Tensor = self.out_proj(attended)[0]
        return output


class WhisperDecoderLayer(nn.Module):
    """Attention to tokens, attention to the sound, and an MLP, each behind a norm and beside a residual."""

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
        """`(num_tokens, d_model)` to the same. `kv_caches`: of the tokens and of the sound."""
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
        """See `SupportsCrossAttention`. A sound is filled up to full length with silence, which the model hears too."""
        del modality, kwargs
        return int(model_config.hf_config.max_source_positions)

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
        """Fill all parts. Of a head that is tied to the embeddings, a checkpoint may have either or both."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.names)
