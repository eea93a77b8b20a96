"""Models whose `forward` does everything: without media, or with media that go through it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from sensorium.errors import ModelError
from sensorium.model_executor.adapter import ForwardAdapter
from sensorium.model_executor.drivers.base import EncodeJob, EncodeResult, StepInputs


class TextDriver:
    """Calls `forward` with ids, and with mapped media where a chunk has some."""

    embeds_media = False

    def __init__(self, model: nn.Module) -> None:
        self._forward = ForwardAdapter(model)
        self._takes_types = self._forward.accepts("token_type_ids")

    def encode(self, jobs: Sequence[EncodeJob]) -> list[EncodeResult]:
        """Never asked for: admission refuses media."""
        raise ModelError("a text model has nothing to encode media with")

    def embed(self, inputs: StepInputs) -> None:
        """See `ModelDriver.embed`."""

    def forward(self, inputs: StepInputs) -> torch.Tensor:
        """See `ModelDriver.forward`."""
        types = {} if inputs.token_type_ids is None else {"token_type_ids": inputs.token_type_ids}
        hidden: torch.Tensor = self._forward(
            input_ids=inputs.input_ids,
            positions=inputs.positions,
            kv_caches=inputs.kv_caches,
            attn_metadata=inputs.attn_metadata,
            **(inputs.media_kwargs or {}),
            **(types if self._takes_types else {}),
        )
        return hidden
