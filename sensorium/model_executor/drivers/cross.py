"""Tier X: models whose decoder attends to the rows of an encoder by cross-attention."""

from __future__ import annotations

import torch
from torch import nn

from sensorium.model_executor.adapter import ForwardAdapter
from sensorium.model_executor.drivers.base import StepInputs
from sensorium.model_executor.drivers.media_encoder import MediaEncoder


class CrossDriver(MediaEncoder):
    """Encodes items in batches, and hands their rows to `forward(..., encoder_outputs=rows)` in the step that writes
    them into the caches of cross-attention. Nothing is put among the text."""

    embeds_media = False

    def __init__(self, model: nn.Module, *, encode_method: str, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(model, encode_method, dtype, device)
        self._forward = ForwardAdapter(model)

    def embed(self, inputs: StepInputs) -> None:
        """See `ModelDriver.embed`."""

    def forward(self, inputs: StepInputs) -> torch.Tensor:
        """See `ModelDriver.forward`."""
        hidden: torch.Tensor = self._forward(
            input_ids=inputs.input_ids,
            positions=inputs.positions,
            kv_caches=inputs.kv_caches,
            attn_metadata=inputs.attn_metadata,
            encoder_outputs=inputs.encoder_outputs,
        )
        return hidden
