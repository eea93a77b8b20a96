"""Tier 0 where text and media can't be told apart: media go through `forward` whole, as in the original engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from sensorium.errors import ModelError
from sensorium.model_executor.adapter import ForwardAdapter
from sensorium.model_executor.drivers.base import EncodeJob, EncodeResult, StepInputs


class AtomicDriver:
    """Calls `forward` with raw ids and, for a chunk that has media, the mapped arguments of the items within it.

    The worker gives a chunk with media a call of its own: a token that another request happened to sample can then
    never be taken for a placeholder.
    """

    embeds_media = False

    def __init__(self, model: nn.Module) -> None:
        self._forward = ForwardAdapter(model)

    def encode(self, jobs: Sequence[EncodeJob]) -> list[EncodeResult]:
        """Never asked for: the scheduler knows that this model's items aren't encoded apart."""
        raise ModelError("a model in atomic mode encodes media in its forward only")

    def embed(self, inputs: StepInputs) -> None:
        """See `ModelDriver.embed`."""

    def forward(self, inputs: StepInputs) -> torch.Tensor:
        """See `ModelDriver.forward`."""
        hidden: torch.Tensor = self._forward(
            input_ids=inputs.input_ids,
            positions=inputs.positions,
            kv_caches=inputs.kv_caches,
            attn_metadata=inputs.attn_metadata,
            **(inputs.media_kwargs or {}),
        )
        return hidden
