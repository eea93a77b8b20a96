"""Tier 0 with every modern feature: media rows are captured once per item and fed to the decoder chunk by chunk.

A forward-only model merges media into its text inside `forward`. All that its decoder ever sees of them are rows, so
those rows can be read in front of the decoder (`Carrier`) by running `forward` up to there with the item's arguments,
and written there again in later passes that run without media arguments at all.

Worked example, prompt `a I I I b` with an image over the three `I`:

    encode   forward(ids=[a I I I b], pixel_values=x) stops at the carrier with rows r0..r4; r1 r2 r3 are the image's
    chunk 1  forward(ids=[a 0])      rows written: {1: r1}
    chunk 2  forward(ids=[0 0 b])    rows written: {0: r2, 1: r3}

Whether this equals running everything at once is checked at load, in `sensorium.worker.probe`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from sensorium.attention import AttentionMetadata, LayerCache
from sensorium.errors import ProcessorError, SensoriumError
from sensorium.messages import EngineRequest, MediaItem
from sensorium.model_executor.adapter import ForwardAdapter
from sensorium.model_executor.drivers.base import (
    EncodeJob,
    EncodeResult,
    StepInputs,
    encoding_error,
    without_media_ids,
)
from sensorium.model_executor.drivers.carrier import Captured, Carrier
from sensorium.model_executor.drivers.media_arguments import index_maps, kwargs_of_items


class AutoSplitDriver:
    """Captures an item's rows at the carrier, and injects rows there in later passes.

    `shares_items`: rows were shown to depend on the item alone, so an item is captured within the text around it;
    otherwise the whole prompt with all its media is run for each capture.
    """

    embeds_media = False

    def __init__(
        self,
        model: nn.Module,
        carrier: Carrier,
        *,
        empty_caches: list[LayerCache],
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device,
        uses_mrope: bool,
        shares_items: bool = False,
    ) -> None:
        self.carrier = carrier
        self.shares_items = shares_items
        self._forward = ForwardAdapter(model)
        self._empty_caches = empty_caches
        self._vocab_size = vocab_size
        self._dtype = dtype
        self._device = device
        self._uses_mrope = uses_mrope

    def encode(self, jobs: Sequence[EncodeJob]) -> list[EncodeResult]:
        """One pass up to the carrier per item, or per request where rows depend on their neighbours."""
        passes: dict[str, torch.Tensor | SensoriumError] = {}
        return [self._encode_one(job, passes) for job in jobs]

    def _encode_one(self, job: EncodeJob, passes: dict[str, torch.Tensor | SensoriumError]) -> EncodeResult:
        start, end = self._window(job) if self.shares_items else (0, len(job.request.prompt_token_ids))
        key = f"{job.request.request_id}:{start}"
        if key not in passes:
            media = (job.item,) if self.shares_items else job.request.media
            try:
                passes[key] = self._capture_window(job.request, media, start, end)
            except Exception as error:  # noqa: BLE001  what a model's code raises is its item's error
                passes[key] = encoding_error(job, error)
        rows = passes[key]
        if isinstance(rows, SensoriumError):
            return rows
        span = job.item.span
        if span.is_dense:
            return rows[span.offset - start : span.end - start]
        return rows[torch.from_numpy(span.positions() - start)]

    @staticmethod
    def _window(job: EncodeJob) -> tuple[int, int]:
        """The item with the text on both sides, up to its neighbours: models may look for marker tokens there."""
        others = [item.span for item in job.request.media if item is not job.item]
        start = max((span.end for span in others if span.end <= job.item.span.offset), default=0)
        end = min(
            (span.offset for span in others if span.offset >= job.item.span.end),
            default=len(job.request.prompt_token_ids),
        )
        return start, end

    def _capture_window(self, request: EngineRequest, media: Sequence[MediaItem], start: int, end: int) -> torch.Tensor:
        token_ids = np.asarray(request.prompt_token_ids[start:end], dtype=np.int64)
        if request.mrope_positions is not None:
            positions = request.mrope_positions[:, start:end]
        else:
            positions = np.arange(start, end)
        kwargs = kwargs_of_items(media, self._device, self._dtype)
        captured = self.capture(token_ids, positions, kwargs, index_maps(media, start))
        if captured is None or len(captured.rows) != len(token_ids):
            raise ProcessorError("the model did not pass this prompt's rows to its decoder.")
        return captured.rows.to(self._dtype)

    def capture(
        self,
        token_ids: np.ndarray[Any, np.dtype[np.int64]],
        positions: np.ndarray[Any, np.dtype[np.int64]],
        kwargs: Mapping[str, Any],
        placeholder_maps: Mapping[str, Any] | None = None,
    ) -> Captured | None:
        """Run one prompt up to the carrier.

        Args:
            token_ids: `(num_tokens,)`
            positions: `(num_tokens,)` or `(3, num_tokens)`
            kwargs: The media arguments of `forward`, batched; empty for a pass without media.
            placeholder_maps: For models that merge by `attn_metadata.multi_modal_placeholder_index_maps`.
        """
        if self._uses_mrope and positions.ndim == 1:
            positions = np.tile(positions, (3, 1))
        metadata = AttentionMetadata.without_cache(
            [len(token_ids)], device=self._device, multi_modal_placeholder_index_maps=placeholder_maps
        )
        return self.carrier.capture(
            lambda: self._forward(
                input_ids=torch.from_numpy(np.ascontiguousarray(token_ids)).to(self._device),
                positions=torch.from_numpy(np.ascontiguousarray(positions)).to(self._device),
                kv_caches=self._empty_caches,
                attn_metadata=metadata,
                **kwargs,
            )
        )

    def embed(self, inputs: StepInputs) -> None:
        """See `ModelDriver.embed`."""

    def forward(self, inputs: StepInputs) -> torch.Tensor:
        """See `ModelDriver.forward`."""
        with self.carrier.injecting(inputs.media):
            hidden: torch.Tensor = self._forward(
                input_ids=without_media_ids(inputs.input_ids, inputs.media, self._vocab_size),
                positions=inputs.positions,
                kv_caches=inputs.kv_caches,
                attn_metadata=inputs.attn_metadata,
            )
        return hidden
