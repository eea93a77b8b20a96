"""A decoder without its output head, for embeddings: Qwen3-Embedding, e5-mistral and others.

Such checkpoints name a generating class (`Qwen3ForCausalLM`) or its inner model (`MistralModel`), and have weights
named after either. Reference: `transformers` `AutoModel`. Text only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from sensorium.attention import AttentionMetadata
from sensorium.config import EngineConfig
from sensorium.model_executor.layers.decoder import Decoder
from sensorium.model_executor.models.llama import LlamaForCausalLM
from sensorium.model_executor.models.registry import ModelRegistry, generating_name
from sensorium.model_executor.models.utils import maybe_prefix


class DecoderForPooling(nn.Module):
    """Computes hidden states after the final norm. The worker pools them."""

    ignored_weights = ("lm_head.*", "score.*", "*.lm_head.*")

    def __init__(self, *, config: EngineConfig, prefix: str = "") -> None:
        super().__init__()
        generating, _ = ModelRegistry.resolve(generating_name(config.model_config.architecture), "native")
        assert issubclass(generating, LlamaForCausalLM)
        options = generating.decoder_options(config.model_config.hf_text_config)
        self.model = Decoder(config=config, options=options, prefix=maybe_prefix(prefix, "model"))

    def get_input_embeddings(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings `(num_tokens, hidden_size)`."""
        return self.model.get_input_embeddings(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        kv_caches: Sequence[torch.Tensor],
        attn_metadata: AttentionMetadata,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states `(num_tokens, hidden_size)`; see `Decoder.forward`."""
        hidden_states: torch.Tensor = self.model(
            input_ids, positions, kv_caches, attn_metadata, intermediate_tensors, inputs_embeds
        )
        return hidden_states

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill the decoder; names may begin with `model.` or not."""
        inner = ((name.removeprefix("model."), tensor) for name, tensor in weights)
        return {f"model.{name}" for name in self.model.load_weights(inner)}
