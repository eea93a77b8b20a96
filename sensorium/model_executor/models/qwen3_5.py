"""Qwen3.5: three layers of four mix tokens by a gated delta rule with a state of fixed size, the fourth by attention.

Reference: `transformers` `Qwen3_5ForCausalLM`. Text only. Its attention differs from Llama's: queries and keys are
normed per head, a quarter of their channels is rotated, and a gate that is projected beside each query head scales what
the head brings. Norms have weights around zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from sensorium.attention import Attention, AttentionMetadata, LayerCache
from sensorium.config import EngineConfig
from sensorium.kernels import Rotation
from sensorium.model_executor.layers.decoder import GatedMLP, rope_of
from sensorium.model_executor.layers.gated_delta_net import GatedDeltaNet
from sensorium.model_executor.layers.layernorm import ZeroCenteredRMSNorm
from sensorium.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from sensorium.model_executor.layers.logits_processor import LogitsProcessor
from sensorium.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sensorium.model_executor.model_loader.weight_utils import FUSED_WEIGHTS, load_fused_weights
from sensorium.model_executor.models.utils import AutoWeightsLoader, maybe_prefix


class Qwen35Attention(nn.Module):
    """Self-attention with normed queries and keys, and a gate on what each head brings."""

    def __init__(self, config: EngineConfig, prefix: str) -> None:
        super().__init__()
        text = config.model_config.hf_text_config
        bias = bool(text.attention_bias)
        # Each query head has its gate beside it, as if it were one more head.
        self.qkv_proj = QKVParallelLinear(
            text.hidden_size,
            text.head_dim,
            2 * text.num_attention_heads,
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
            self.qkv_proj.num_heads // 2,
            text.head_dim,
            text.head_dim**-0.5,
            num_kv_heads=self.qkv_proj.num_kv_heads,
            cache_config=config.cache_config,
            quant_config=config.quant_config,
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
        query_and_gate, key, value = self.qkv_proj.split_heads(qkv)
        query, gate = query_and_gate[:, 0::2], query_and_gate[:, 1::2]
        query, key = self.q_norm.forward(query), self.k_norm.forward(key)
        attended: torch.Tensor = self.attn(query, key, value, kv_cache, attn_metadata, rotation=rotation)
        return self.o_proj.forward(attended * torch.sigmoid(gate).flatten(1))[0]


class Qwen35DecoderLayer(nn.Module):
    """A token mixer and an MLP, each behind a norm and around it a residual that is added in the next norm."""

    def __init__(self, config: EngineConfig, layer: int, prefix: str) -> None:
        super().__init__()
        text = config.model_config.hf_text_config
        self.is_linear = text.layer_types[layer] == "linear_attention"
        if self.is_linear:
            self.linear_attn = GatedDeltaNet(config, f"{prefix}.linear_attn")
        else:
            self.self_attn = Qwen35Attention(config, f"{prefix}.self_attn")
        self.mlp = GatedMLP(
            text.hidden_size,
            text.intermediate_size,
            text.hidden_act,
            quant_config=config.quant_config,
            prefix=f"{prefix}.mlp",
        )
        self.input_layernorm = ZeroCenteredRMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.post_attention_layernorm = ZeroCenteredRMSNorm(text.hidden_size, eps=text.rms_norm_eps)

    def forward(
        self,
        rotation: Rotation,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        kv_cache: Any,
        attn_metadata: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's output, and the residual that is still to be added to it."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm.forward(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm.forward(hidden_states, residual)
        if self.is_linear:
            hidden_states = self.linear_attn(hidden_states, kv_cache, attn_metadata)
        else:
            hidden_states = self.self_attn.forward(rotation, hidden_states, kv_cache, attn_metadata)
        hidden_states, residual = self.post_attention_layernorm.forward(hidden_states, residual)
        return self.mlp.forward(hidden_states), residual


class Qwen35Decoder(nn.Module):
    """Token embeddings, the layers, and the final norm."""

    def __init__(self, *, config: EngineConfig, prefix: str = "") -> None:
        super().__init__()
        text = config.model_config.hf_text_config
        self.embed_tokens = VocabParallelEmbedding(text.vocab_size, text.hidden_size, prefix=f"{prefix}.embed_tokens")
        self.rotary_emb = rope_of(config)
        self.layers = nn.ModuleList(
            Qwen35DecoderLayer(config, layer, f"{prefix}.layers.{layer}") for layer in range(text.num_hidden_layers)
        )
        self.norm = ZeroCenteredRMSNorm(text.hidden_size, eps=text.rms_norm_eps)

    def get_input_embeddings(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings `(num_tokens, hidden_size)`."""
        embeddings: torch.Tensor = self.embed_tokens(input_ids)
        return embeddings

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        kv_caches: Sequence[LayerCache],
        attn_metadata: AttentionMetadata,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states `(num_tokens, hidden_size)` of a flat batch; see `layers.decoder.Decoder.forward`."""
        if inputs_embeds is None:
            assert input_ids is not None, "a decoder needs input_ids or inputs_embeds"
            inputs_embeds = self.get_input_embeddings(input_ids)
        hidden_states = inputs_embeds
        residual: torch.Tensor | None = None
        # Of text, the three rows of M-RoPE are equal.
        rotation = self.rotary_emb.rotation(positions if positions.dim() == 1 else positions[0])
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            hidden_states, residual = layer(rotation, hidden_states, residual, kv_cache, attn_metadata)
        normed: torch.Tensor = self.norm(hidden_states, residual)[0]
        return normed

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill the parameters from the checkpoint's names, relative to the decoder."""
        return load_fused_weights(self, weights, FUSED_WEIGHTS)


class Qwen3_5ForCausalLM(nn.Module):  # noqa: N801 -- the architecture's name
    """The decoder and its output head. Weights of a head that predicts further tokens (`mtp`) are not used."""

    def __init__(self, *, config: EngineConfig, prefix: str = "") -> None:
        super().__init__()
        text = config.model_config.hf_text_config
        self.model = Qwen35Decoder(config=config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(text.vocab_size, text.hidden_size, prefix=maybe_prefix(prefix, "lm_head"))
        if text.tie_word_embeddings:
            self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(text.vocab_size)

    def get_input_embeddings(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings `(num_tokens, hidden_size)`."""
        return self.model.get_input_embeddings(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        kv_caches: Sequence[LayerCache],
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
        return AutoWeightsLoader(self, skip_prefixes=("mtp.",)).load_weights(weights)
