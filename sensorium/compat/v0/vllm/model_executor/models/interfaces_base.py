"""Base types of models, for annotations."""

from __future__ import annotations

from typing import Any, Protocol

import torch

__all__ = ["VllmModel", "VllmModelForEmbedding", "VllmModelForPooling", "VllmModelForTextGeneration"]


class VllmModel(Protocol):
    """Any model."""

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, kv_caches: Any, attn_metadata: Any) -> Any:
        """Hidden states `(num_tokens, hidden_size)`."""
        ...


class VllmModelForTextGeneration(VllmModel, Protocol):
    """A model that generates."""

    def compute_logits(self, hidden_states: torch.Tensor, sampling_metadata: Any) -> torch.Tensor | None:
        """Logits `(num_rows, vocab_size)`."""
        ...


class VllmModelForPooling(VllmModel, Protocol):
    """A model whose rows are pooled."""

    def pooler(self, hidden_states: torch.Tensor, pooling_metadata: Any) -> Any:
        """A vector for each sequence."""
        ...


VllmModelForEmbedding = VllmModelForPooling
