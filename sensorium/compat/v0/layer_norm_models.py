"""The common parts of OPT and Persimmon: decoders with layer norms and biases, and models with such a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from sensorium.attention import AttentionMetadata, LayerCache
from sensorium.compat.v0.inner_models import with_names_of_v0
from sensorium.compat.v0.text_models import engine_config_of
from sensorium.config import EngineConfig
from sensorium.model_executor.layers.logits_processor import LogitsProcessor
from sensorium.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sensorium.model_executor.models.utils import maybe_prefix

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class EmbeddedDecoder(nn.Module):
    """A decoder that takes token ids or embedded rows, with the constructor of V0.

    A subclass makes its modules in `build`, among them the table `embed_tokens`, and runs its layers in `decode`.
    """

    embed_tokens: VocabParallelEmbedding

    def __init__(
        self,
        config: PretrainedConfig | None = None,
        cache_config: Any = None,
        quant_config: Any = None,
        prefix: str = "",
        *,
        vllm_config: EngineConfig | None = None,
    ) -> None:
        super().__init__()
        engine_config = engine_config_of(config, vllm_config)
        self.config = engine_config.model_config.hf_text_config
        self.build(engine_config, prefix)
        with_names_of_v0(self)

    def build(self, engine_config: EngineConfig, prefix: str) -> None:
        """Make the modules."""
        raise NotImplementedError

    def decode(
        self,
        inputs_embeds: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: Sequence[LayerCache],
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Rows `(num_tokens, width)` of a flat batch to hidden states of the same shape."""
        raise NotImplementedError

    def get_input_embeddings(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings `(num_tokens, width)`."""
        rows: torch.Tensor = self.embed_tokens(input_ids)
        return rows

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        kv_caches: Sequence[LayerCache],
        attn_metadata: AttentionMetadata,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states `(num_tokens, width)` of a flat batch; see `Decoder.forward`."""
        if inputs_embeds is None:
            assert input_ids is not None, "a decoder needs input_ids or inputs_embeds"
            inputs_embeds = self.get_input_embeddings(input_ids)
        return self.decode(inputs_embeds, positions, kv_caches, attn_metadata)


class HeadedModel(EmbeddedDecoder):
    """A decoder `model` and its output head, which may be tied to the embeddings."""

    decoder_class: ClassVar[type[EmbeddedDecoder]]

    def build(self, engine_config: EngineConfig, prefix: str) -> None:
        """See `EmbeddedDecoder`."""
        self.model = self.decoder_class(vllm_config=engine_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = self.embed_tokens
        if not self.config.tie_word_embeddings:
            self.lm_head = ParallelLMHead(
                self.config.vocab_size, self.embed_tokens.embedding_dim, prefix=maybe_prefix(prefix, "lm_head")
            )
        self.logits_processor = LogitsProcessor(self.config.vocab_size)

    @property
    def embed_tokens(self) -> VocabParallelEmbedding:  # type: ignore[override]
        """The table of token embeddings."""
        return self.model.embed_tokens

    def decode(
        self,
        inputs_embeds: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: Sequence[LayerCache],
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """See `EmbeddedDecoder`."""
        rows: torch.Tensor = self.model(None, positions, kv_caches, attn_metadata, None, inputs_embeds)
        return rows

    def compute_logits(self, hidden_states: torch.Tensor, sampling_metadata: Any) -> torch.Tensor:
        """Logits `(num_rows, vocab_size)`."""
        logits: torch.Tensor = self.logits_processor(self.lm_head, hidden_states, sampling_metadata)
        return logits
