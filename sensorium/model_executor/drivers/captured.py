"""Models that run by modules of transformers: what their outer part makes of media is captured, item by item.

An item's part of the prompt goes through the outer model up to its decoder, alone; the rows and all else that media
bring are kept, and written chunk by chunk. Of a prompt whose items can't be told apart, all of it is captured at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from sensorium.attention import AttentionMetadata, LayerCache
from sensorium.model_executor.drivers.base import (
    EncodeJob,
    EncodeResult,
    ItemRows,
    MediaRows,
    StepInputs,
    encoding_error,
    without_media_ids,
)
from sensorium.multimodal.hf_items import of_item


class CapturesMedia(Protocol):
    """A model whose outer part and decoder can be run apart."""

    def capture(self, token_ids: torch.Tensor, tensors: Mapping[str, Any], media: torch.Tensor) -> ItemRows:
        """What the decoder gets of rows `media` of a part of a prompt, given the processor's tensors for that part."""
        ...

    def embed(self, token_ids: torch.Tensor, media: MediaRows | None) -> torch.Tensor:
        """Rows `(num_tokens, hidden_size)`."""
        ...

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: Sequence[LayerCache],
        attn_metadata: AttentionMetadata,
        media: MediaRows | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states `(num_tokens, hidden_size)`."""
        ...


class CapturedDriver:
    """Captures an item's rows in front of the decoder, and gives them to it in later passes.

    `embeds_media`: rows are all that media bring.
    """

    def __init__(self, model: CapturesMedia, *, vocab_size: int, device: torch.device, embeds_media: bool) -> None:
        self.embeds_media = embeds_media
        self._model = model
        self._vocab_size = vocab_size
        self._device = device

    def encode(self, jobs: Sequence[EncodeJob]) -> list[EncodeResult]:
        """A pass up to the decoder per item."""
        return [self._encode_one(job) for job in jobs]

    def _encode_one(self, job: EncodeJob) -> EncodeResult:
        tensors, is_whole = of_item(job.item.kwargs or {})
        span, prompt = job.item.span, job.request.prompt_token_ids
        start, end = (0, len(prompt)) if is_whole else (span.offset, span.end)
        try:
            token_ids = torch.from_numpy(np.asarray(prompt[start:end], dtype=np.int64)).to(self._device)
            media = torch.from_numpy(span.positions() - start).to(self._device)
            return self._model.capture(token_ids, tensors, media)
        except Exception as error:  # noqa: BLE001  what a model's code raises is its item's error
            return encoding_error(job, error)

    def embed(self, inputs: StepInputs) -> torch.Tensor:
        """See `ModelDriver.embed`."""
        return self._model.embed(self._ids(inputs), inputs.media)

    def forward(self, inputs: StepInputs) -> torch.Tensor:
        """See `ModelDriver.forward`."""
        return self._model.forward(
            self._ids(inputs),
            inputs.positions,
            inputs.kv_caches,
            inputs.attn_metadata,
            inputs.media,
            inputs.inputs_embeds,
        )

    def _ids(self, inputs: StepInputs) -> torch.Tensor:
        return without_media_ids(inputs.input_ids, inputs.media, self._vocab_size)
