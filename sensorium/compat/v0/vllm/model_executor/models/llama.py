"""Llama, with V0's constructors: the decoder, its head, and its parts for models that put their own together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sensorium.attention import AttentionMetadata
from sensorium.compat.v0.text_models import TextDecoder, TextModel, engine_config_of
from sensorium.model_executor.layers.decoder import DecoderLayer, GatedMLP, rope_of
from sensorium.model_executor.layers.quantization import QuantizationConfig
from sensorium.model_executor.models.llama import LlamaForCausalLM as RegisteredLlama

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["LlamaDecoderLayer", "LlamaForCausalLM", "LlamaMLP", "LlamaModel"]


class LlamaMLP(GatedMLP):
    """The feed-forward part of a layer."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str,
        quant_config: QuantizationConfig | None = None,
        bias: bool = False,
        prefix: str = "",
    ) -> None:
        super().__init__(hidden_size, intermediate_size, hidden_act, bias, quant_config, prefix)


class LlamaDecoderLayer(DecoderLayer):
    """A layer that finds its rotary angles itself."""

    def __init__(
        self, config: PretrainedConfig, cache_config: Any = None, quant_config: Any = None, prefix: str = ""
    ) -> None:
        engine_config = engine_config_of(config, None)
        options = RegisteredLlama.decoder_options(config)
        index = next((int(part) for part in reversed(prefix.split(".")) if part.isdigit()), 0)
        super().__init__(engine_config, options, index, prefix)
        self.rotary_emb = rope_of(engine_config)

    def forward(  # type: ignore[override]
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: AttentionMetadata,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `DecoderLayer.forward`."""
        rotation = self.rotary_emb.rotation(positions)
        return super().forward(rotation, hidden_states, residual, kv_cache, attn_metadata)


class LlamaModel(TextDecoder):
    """The decoder."""

    model_class = RegisteredLlama


class LlamaForCausalLM(TextModel, RegisteredLlama):
    """The decoder, and its output head."""
