"""Models with a tower for texts and one for media: what a prompt is decides which of them runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sensorium.model_executor.drivers.base import StepInputs
from sensorium.model_executor.drivers.media_encoder import MediaEncoder


class DualDriver(MediaEncoder):
    """Encodes media by `get_multimodal_embeddings`, and texts by `forward`; a media row is its prompt's row."""

    embeds_media = False

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(model, "get_multimodal_embeddings", dtype, device)
        self._forward: Any = model

    def embed(self, inputs: StepInputs) -> None:
        """See `ModelDriver.embed`."""

    def forward(self, inputs: StepInputs) -> torch.Tensor:
        """See `ModelDriver.forward`."""
        media, is_media = inputs.media, None
        if media is not None:
            is_media = torch.zeros_like(inputs.input_ids, dtype=torch.bool).index_fill_(0, media.index, value=True)
        rows: torch.Tensor = self._forward(inputs.input_ids, inputs.attn_metadata, is_media)
        return rows if media is None else rows.index_copy(0, media.index, media.rows.to(rows.dtype))
