"""The interface between the worker and a model of any tier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from sensorium.attention import AttentionMetadata, LayerCache
from sensorium.errors import ProcessorError, SensoriumError
from sensorium.logger import get_logger
from sensorium.messages import EngineRequest, MediaItem
from sensorium.model_executor.failures import told_to_caller

logger = get_logger(__name__)

IndexArray = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True, eq=False)
class ItemRows:
    """What an encoder makes of one media item."""

    rows: torch.Tensor
    """`(num_rows, hidden_size)`: what enters the decoder."""
    others: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """`(num_rows, ...)` each: what the decoder gets of the same rows elsewhere, such as behind its first layers."""

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, first: int, last: int) -> ItemRows:
        """Rows `[first, last)`."""
        return ItemRows(self.rows[first:last], {name: each[first:last] for name, each in self.others.items()})


@dataclass(frozen=True, slots=True, eq=False)
class PlacedRows:
    """`rows[i]` belongs to row `index[i]` of a batch."""

    index: torch.Tensor
    """`(num_rows,)` int64"""
    rows: torch.Tensor
    """`(num_rows, ...)`"""

    def part(self, begin: int, end: int) -> PlacedRows:
        """Those of rows `[begin, end)` of the batch, counted from `begin`."""
        inside = (self.index >= begin) & (self.index < end)
        return PlacedRows(self.index[inside] - begin, self.rows[inside])


@dataclass(frozen=True, slots=True, eq=False)
class MediaRows:
    """Encoder rows for one step: `rows[i]` stands at row `index[i]` of the batch."""

    index: torch.Tensor
    """`(num_media_rows,)` int64"""
    rows: torch.Tensor
    """`(num_media_rows, hidden_size)` in the model's dtype"""
    others: Mapping[str, PlacedRows] = field(default_factory=dict)
    """The rows of `ItemRows.others`, by name, of the items that have some."""

    @classmethod
    def of(cls, placed: Sequence[tuple[IndexArray, ItemRows]], device: torch.device) -> MediaRows:
        """The rows of a batch from those of parts of items, in their order, each with the rows where it stands."""
        rows = _placed([(index, item.rows) for index, item in placed], device)
        others = {
            name: _placed([(index, item.others[name]) for index, item in placed if name in item.others], device)
            for name in dict.fromkeys(name for _, item in placed for name in item.others)
        }
        return cls(rows.index, rows.rows, others)

    def part(self, begin: int, end: int) -> MediaRows:
        """The rows that stand in rows `[begin, end)` of the batch, of a batch of those alone."""
        rows = PlacedRows(self.index, self.rows).part(begin, end)
        others = {name: each.part(begin, end) for name, each in self.others.items()}
        return MediaRows(rows.index, rows.rows, {name: each for name, each in others.items() if len(each.index)})


def _placed(parts: Sequence[tuple[IndexArray, torch.Tensor]], device: torch.device) -> PlacedRows:
    index = torch.from_numpy(np.concatenate([each for each, _ in parts]).astype(np.int64, copy=False))
    if device.type != "cpu":
        index = index.pin_memory().to(device, non_blocking=True)
    rows = [each for _, each in parts]
    return PlacedRows(index, rows[0] if len(rows) == 1 else torch.cat(rows))


@dataclass(frozen=True, slots=True, eq=False)
class StepInputs:
    """What a forward pass gets, whatever mix of prefill chunks and decodes it is."""

    input_ids: torch.Tensor
    """`(num_tokens,)` int64. Media rows may hold negative ids, or ids beyond the vocabulary."""
    positions: torch.Tensor
    """`(num_tokens,)` int64, or `(3, num_tokens)` with M-RoPE."""
    kv_caches: list[LayerCache]
    """An entry per layer with a cache, such as `(2, num_blocks, block_size, num_kv_heads, head_size)` of attention."""
    attn_metadata: AttentionMetadata
    media: MediaRows | None = None
    media_kwargs: Mapping[str, Any] | None = None
    """Atomic mode only: the mapped media that lie within this batch, as the model's `forward` takes them."""
    encoder_outputs: torch.Tensor | None = None
    """`(num_rows, hidden_size)`: rows of items that layers of cross-attention write into their caches in this step, one
    item behind the other; None: there are none."""
    token_type_ids: torch.Tensor | None = None
    """`(num_tokens,)` int64: which text of a pair each row belongs to; None: all to the first."""
    inputs_embeds: torch.Tensor | None = None
    """What the driver's `embed` made of the same batch, if that was asked before: `(num_tokens, hidden_size)`."""


@dataclass(frozen=True, slots=True, eq=False)
class EncodeJob:
    """One media item to encode, with the request it stands in."""

    request: EngineRequest
    item: MediaItem


EncodeResult = torch.Tensor | ItemRows | SensoriumError
"""Rows `(item.num_rows, hidden_size)` of one item, alone or with others, or why there are none."""


class ModelDriver(Protocol):
    """Runs a model of one tier. Stateless between calls; used by one thread."""

    embeds_media: bool
    """Whether `embed` puts media in their places, so that they don't matter to `forward` any more."""

    def encode(self, jobs: Sequence[EncodeJob]) -> list[EncodeResult]:
        """Encode media items. One item's failure leaves the others' results untouched."""

    def embed(self, inputs: StepInputs) -> torch.Tensor | None:
        """The rows that enter the decoder, media in their places; None: `forward` makes them, from ids alone."""

    def forward(self, inputs: StepInputs) -> torch.Tensor:
        """Hidden states `(num_tokens, hidden_size)` of a step."""


def without_media_ids(input_ids: torch.Tensor, media: MediaRows | None, vocab_size: int) -> torch.Tensor:
    """`input_ids` with 0 at media rows and every id inside the vocabulary, fit for an embedding lookup.

    Ids outside the vocabulary stand only at media rows of an admitted request; they are clamped all the same,
    because a lookup out of bounds would end the process.
    """
    if media is None:
        return input_ids
    return input_ids.index_fill(0, media.index, 0).clamp_(0, vocab_size - 1)


def encoding_error(job: EncodeJob, error: BaseException) -> SensoriumError:
    """The caller's view of an encoder failure, whichever tier it happened on; other details go to the log only."""
    logger.warning("encoding %s of request %s failed", job.item.modality, job.request.request_id, exc_info=error)
    if isinstance(error, SensoriumError):
        return error
    return ProcessorError(
        f"{job.item.modality} item {job.item.index} could not be encoded by the model ({told_to_caller(error)}), with "
        f"{job.item.num_rows} places for its rows. Check that the item is valid for this "
        f"model, and that its input processor writes one placeholder for each row."
    )
