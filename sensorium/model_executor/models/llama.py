"""Llama, and models with Llama's architecture, such as Mistral.

Paper: Touvron et al. 2023. Reference: `transformers` `LlamaForCausalLM`. Text only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sensorium.attention import AttentionMetadata, LayerCache
from sensorium.config import EngineConfig
from sensorium.model_executor.layers.decoder import Decoder, DecoderOptions
from sensorium.model_executor.layers.logits_processor import LogitsProcessor
from sensorium.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from sensorium.model_executor.models.utils import AutoWeightsLoader, maybe_prefix

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class LlamaForCausalLM(nn.Module):
    """A decoder and its output head."""

    def __init__(self, *, config: EngineConfig, prefix: str = "") -> None:
        super().__init__()
        text = config.model_config.hf_text_config
        self.model = Decoder(config=config, options=self.decoder_options(text), prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(text.vocab_size, text.hidden_size, prefix=maybe_prefix(prefix, "lm_head"))
        if getattr(text, "tie_word_embeddings", False):
            self.lm_head.tie_weights(self.model.embed_tokens)
        soft_cap = getattr(text, "final_logit_softcapping", None)
        self.logits_processor = LogitsProcessor(text.vocab_size, soft_cap=soft_cap)

    @staticmethod
    def decoder_options(text_config: PretrainedConfig) -> DecoderOptions:
        """The decoder's differences from Llama's; here, which projections have biases."""
        attention_bias = bool(getattr(text_config, "attention_bias", False))
        return DecoderOptions(
            qkv_bias=attention_bias,
            output_bias=attention_bias,
            mlp_bias=bool(getattr(text_config, "mlp_bias", False)),
        )

    def get_input_embeddings(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings `(num_tokens, hidden_size)`."""
        return self.model.get_input_embeddings(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        kv_caches: Sequence[LayerCache],
        attn_metadata: AttentionMetadata,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states `(num_tokens, hidden_size)`; see `Decoder.forward`."""
        hidden_states: torch.Tensor = self.model(
            input_ids, positions, kv_caches, attn_metadata, intermediate_tensors, inputs_embeds
        )
        return hidden_states

    def compute_logits(self, hidden_states: torch.Tensor, sampling_metadata: Any) -> torch.Tensor:
        """Logits `(num_rows, vocab_size)`."""
        logits: torch.Tensor = self.logits_processor(self.lm_head, hidden_states, sampling_metadata)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill the parameters. If the head is tied to the embeddings, a checkpoint may have either or both."""
        return AutoWeightsLoader(self).load_weights(weights)
