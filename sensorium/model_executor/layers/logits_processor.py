"""From hidden states to logits: select rows, apply the head, cap, scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sensorium.model_executor.adapter_rows import adapters_of_selected
from sensorium.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding


class LogitsProcessor(nn.Module):
    """Computes logits of the rows that are to be sampled.

    Args:
        vocab_size: Rows of the head that are tokens.
        org_vocab_size: The vocabulary without rows that were added to the head; logits are cut to it.
        scale: Factor on the logits.
        logits_as_input: The hidden states are logits already.
        soft_cap: `c` in `c * tanh(logit / c)`.
    """

    def __init__(
        self,
        vocab_size: int,
        org_vocab_size: int | None = None,
        scale: float = 1.0,
        logits_as_input: bool = False,
        soft_cap: float | None = None,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.org_vocab_size = vocab_size if org_vocab_size is None else org_vocab_size
        self.scale = scale
        self.logits_as_input = logits_as_input
        self.soft_cap = soft_cap

    def forward(
        self, lm_head: VocabParallelEmbedding, hidden_states: torch.Tensor, sampling_metadata: Any = None
    ) -> torch.Tensor:
        """Logits `(num_rows, org_vocab_size)` in the head's dtype.

        Args:
            lm_head: A `ParallelLMHead`, or the embeddings of a model that shares them with its head.
            hidden_states: `(num_rows, hidden_size)`.
            sampling_metadata: If it has `selected_token_indices` `(num_selected,)`, only these rows are computed;
                otherwise all.
        """
        rows = getattr(sampling_metadata, "selected_token_indices", None)
        if rows is not None:
            with adapters_of_selected(rows):
                return self._logits(lm_head, hidden_states.index_select(0, rows))
        return self._logits(lm_head, hidden_states)

    def _logits(self, lm_head: VocabParallelEmbedding, hidden_states: torch.Tensor) -> torch.Tensor:
        logits = hidden_states if self.logits_as_input else lm_head.project(hidden_states)
        logits = logits[..., : self.org_vocab_size]
        if self.soft_cap is not None:
            logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
        return logits if self.scale == 1.0 else logits * self.scale

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"vocab_size={self.vocab_size}, scale={self.scale}, soft_cap={self.soft_cap}"
