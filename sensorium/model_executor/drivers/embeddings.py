"""Tier 1 and 2: models that encode media and embed text in methods of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sensorium.model_executor.adapter import ForwardAdapter
from sensorium.model_executor.counted_merges import CountedMerges
from sensorium.model_executor.drivers.base import StepInputs, without_media_ids
from sensorium.model_executor.drivers.media_encoder import MediaEncoder


class EmbeddingsDriver(MediaEncoder):
    """Encodes items in batches, embeds text, puts rows where they belong, and calls `forward(inputs_embeds=...)`.

    `merges_itself`: the model's own merge does more than put rows at their places, so it is used for every chunk.
    """

    embeds_media = True

    def __init__(
        self,
        model: nn.Module,
        *,
        encode_method: str,
        embed_method: str,
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device,
        merges_itself: bool = False,
    ) -> None:
        super().__init__(model, encode_method, dtype, device)
        self.merges_itself = merges_itself
        self._forward = ForwardAdapter(model)
        self._embed: Callable[..., torch.Tensor] = getattr(model, embed_method)
        self._vocab_size = vocab_size

    def embed_ids(self, input_ids: torch.Tensor, multimodal_embeddings: Any = None) -> torch.Tensor:
        """The model's own embedding of ids, merged with what its encoder returned if that is given."""
        if multimodal_embeddings is None:
            return self._embed(input_ids)
        with CountedMerges():
            return self._embed(input_ids, multimodal_embeddings)

    def embed(self, inputs: StepInputs) -> torch.Tensor:
        """Decoder inputs `(num_tokens, hidden_size)`: text embeddings with media rows at their places."""
        media = inputs.media
        if media is None:
            return self._embed(inputs.input_ids)
        if self.merges_itself:
            return self.embed_ids(inputs.input_ids, media.rows)
        text = self._embed(without_media_ids(inputs.input_ids, media, self._vocab_size))
        return text.index_copy(0, media.index, media.rows.to(text.dtype))

    def forward(self, inputs: StepInputs) -> torch.Tensor:
        """See `ModelDriver.forward`."""
        hidden: torch.Tensor = self._forward(
            input_ids=None,
            positions=inputs.positions,
            kv_caches=inputs.kv_caches,
            attn_metadata=inputs.attn_metadata,
            inputs_embeds=self.embed(inputs) if inputs.inputs_embeds is None else inputs.inputs_embeds,
        )
        return hidden
