"""Gemma 3: most layers see a window of the past, every sixth all of it. Text only.

Paper: Gemma team 2025, "Gemma 3 Technical Report", section 2. Reference: `transformers` `Gemma3ForCausalLM`. Where it
differs from Llama: queries and keys are normed per head; the layers with a window have rotary frequencies of their
own; attention and MLP are normed before and after; norms have weights around zero; embeddings are scaled by the root of
their width; the MLP's gate is a GELU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import nn

from sensorium.attention import Attention, AttentionMetadata
from sensorium.config import EngineConfig
from sensorium.errors import ModelError
from sensorium.kernels import Rotation
from sensorium.model_executor.layers.decoder import GatedMLP, rope_of, sliding_window_of
from sensorium.model_executor.layers.layernorm import ZeroCenteredRMSNorm
from sensorium.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from sensorium.model_executor.layers.logits_processor import LogitsProcessor
from sensorium.model_executor.layers.rotary_embedding import RotaryEmbedding
from sensorium.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sensorium.model_executor.model_loader.weight_utils import FUSED_WEIGHTS, load_fused_weights
from sensorium.model_executor.models.utils import AutoWeightsLoader, maybe_prefix


class Gemma3Attention(nn.Module):
    """Self-attention with normed queries and keys, over a window or over everything."""

    def __init__(self, config: EngineConfig, layer: int, prefix: str) -> None:
        super().__init__()
        text = config.model_config.hf_text_config
        bias = bool(text.attention_bias)
        self.qkv_proj = QKVParallelLinear(
            text.hidden_size,
            text.head_dim,
            text.num_attention_heads,
            text.num_key_value_heads,
            bias=bias,
            quant_config=config.quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            text.num_attention_heads * text.head_dim,
            text.hidden_size,
            bias=bias,
            quant_config=config.quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.q_norm = ZeroCenteredRMSNorm(text.head_dim, eps=text.rms_norm_eps)
        self.k_norm = ZeroCenteredRMSNorm(text.head_dim, eps=text.rms_norm_eps)
        self.attn = Attention(
            self.qkv_proj.num_heads,
            text.head_dim,
            text.query_pre_attn_scalar**-0.5,
            num_kv_heads=self.qkv_proj.num_kv_heads,
            cache_config=config.cache_config,
            quant_config=config.quant_config,
            per_layer_sliding_window=sliding_window_of(text, layer),
            prefix=f"{prefix}.attn",
        )

    def forward(
        self,
        rotation: Rotation,
        hidden_states: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """`(num_tokens, hidden_size)` to the same, given the step's rotation."""
        qkv, _ = self.qkv_proj.forward(hidden_states)
        query, key, value = self.qkv_proj.split_heads(qkv)
        query, key = self.q_norm.forward(query), self.k_norm.forward(key)
        attended: torch.Tensor = self.attn(query, key, value, kv_cache, attn_metadata, rotation=rotation)
        return self.o_proj.forward(attended)[0]


class Gemma3DecoderLayer(nn.Module):
    """Attention and MLP, each normed before and after, around each a residual."""

    def __init__(self, config: EngineConfig, layer: int, prefix: str) -> None:
        super().__init__()
        text = config.model_config.hf_text_config
        self.layer_type: str = text.layer_types[layer]
        self.self_attn = Gemma3Attention(config, layer, f"{prefix}.self_attn")
        self.mlp = GatedMLP(
            text.hidden_size,
            text.intermediate_size,
            text.hidden_activation,
            quant_config=config.quant_config,
            prefix=f"{prefix}.mlp",
        )
        self.input_layernorm = ZeroCenteredRMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.post_attention_layernorm = ZeroCenteredRMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.pre_feedforward_layernorm = ZeroCenteredRMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.post_feedforward_layernorm = ZeroCenteredRMSNorm(text.hidden_size, eps=text.rms_norm_eps)

    def forward(
        self,
        rotation: Rotation,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's output, and the residual that is still to be added to it."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm.forward(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm.forward(hidden_states, residual)
        hidden_states = self.self_attn.forward(rotation, hidden_states, kv_cache, attn_metadata)
        hidden_states = self.post_attention_layernorm.forward(hidden_states)
        hidden_states, residual = self.pre_feedforward_layernorm.forward(hidden_states, residual)
        return self.post_feedforward_layernorm.forward(self.mlp.forward(hidden_states)), residual


class Gemma3Decoder(nn.Module):
    """Scaled token embeddings, the layers, and the final norm."""

    embed_scale: torch.Tensor

    def __init__(self, *, config: EngineConfig, prefix: str = "") -> None:
        super().__init__()
        text = config.model_config.hf_text_config
        self.embed_tokens = VocabParallelEmbedding(text.vocab_size, text.hidden_size, prefix=f"{prefix}.embed_tokens")
        # In the model's dtype, and on its device: a recorded pass can't bring it there.
        self.register_buffer("embed_scale", torch.tensor(text.hidden_size**0.5), persistent=False)
        types = sorted(set(text.layer_types))
        self.rotary_embs = nn.ModuleDict({layer_type: rope_of(config, layer_type) for layer_type in types})
        self.layers = nn.ModuleList(
            Gemma3DecoderLayer(config, layer, f"{prefix}.layers.{layer}") for layer in range(text.num_hidden_layers)
        )
        self.norm = ZeroCenteredRMSNorm(text.hidden_size, eps=text.rms_norm_eps)

    def get_input_embeddings(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Scaled token embeddings `(num_tokens, hidden_size)`; the factor is rounded to their dtype, as in training."""
        embeddings: torch.Tensor = self.embed_tokens(input_ids)
        return embeddings * self.embed_scale

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        kv_caches: Sequence[torch.Tensor],
        attn_metadata: AttentionMetadata,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states `(num_tokens, hidden_size)` of a flat batch; see `layers.decoder.Decoder.forward`."""
        if inputs_embeds is None:
            assert input_ids is not None, "a decoder needs input_ids or inputs_embeds"
            inputs_embeds = self.get_input_embeddings(input_ids)
        hidden_states = inputs_embeds
        residual: torch.Tensor | None = None
        rotations = {name: cast(RotaryEmbedding, rope).rotation(positions) for name, rope in self.rotary_embs.items()}
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            rotation = rotations[cast(Gemma3DecoderLayer, layer).layer_type]
            hidden_states, residual = layer(rotation, hidden_states, residual, kv_cache, attn_metadata)
        normed: torch.Tensor = self.norm(hidden_states, residual)[0]
        return normed

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill the parameters from the checkpoint's names, relative to the decoder."""
        return load_fused_weights(self, weights, FUSED_WEIGHTS)


class Gemma3ForCausalLM(nn.Module):
    """The decoder and its output head, which mostly is the embeddings.

    Raises:
        ModelError: The config asks for attention in both directions, as embedding models of this family have it.
    """

    def __init__(self, *, config: EngineConfig, prefix: str = "") -> None:
        super().__init__()
        text = config.model_config.hf_text_config
        if getattr(text, "use_bidirectional_attention", False):
            raise ModelError(
                "use_bidirectional_attention of config.json: got true, expected false. Serve a model that generates."
            )
        self.model = Gemma3Decoder(config=config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(text.vocab_size, text.hidden_size, prefix=maybe_prefix(prefix, "lm_head"))
        if text.tie_word_embeddings:
            self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(text.vocab_size, soft_cap=text.final_logit_softcapping)

    def get_input_embeddings(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Scaled token embeddings `(num_tokens, hidden_size)`."""
        return self.model.get_input_embeddings(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        kv_caches: Sequence[torch.Tensor],
        attn_metadata: AttentionMetadata,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states `(num_tokens, hidden_size)`."""
        hidden_states: torch.Tensor = self.model(input_ids, positions, kv_caches, attn_metadata, inputs_embeds)
        return hidden_states

    def compute_logits(self, hidden_states: torch.Tensor, sampling_metadata: Any) -> torch.Tensor:
        """Logits `(num_rows, vocab_size)`."""
        logits: torch.Tensor = self.logits_processor(self.lm_head, hidden_states, sampling_metadata)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill the parameters. Of a head that is tied to the embeddings, a checkpoint may have either or both."""
        return AutoWeightsLoader(self).load_weights(weights)
