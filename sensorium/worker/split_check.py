"""What running a model on dummy media shows: where its media rows stand, and whether they may be split off.

For tier 0 (`observe_split`):
- rows in front of the decoder with and without media arguments differ exactly at media rows;
- an item's rows at another offset and beside other items are equal, or the item can't be shared between prompts;
- a prompt cut in the middle of an item, with rows injected, gives the hidden states of the whole prompt.

For tier 1 (`observe_embeddings`): which tokens the model's own merge replaces, and whether it does no more than that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from sensorium.attention import AttentionMetadata, compute_slot_mapping
from sensorium.config import EngineConfig
from sensorium.logger import get_logger
from sensorium.model_executor.adapter import ForwardAdapter
from sensorium.model_executor.drivers import AutoSplitDriver, EmbeddingsDriver, MediaRows, StepInputs
from sensorium.model_executor.drivers.carrier import Captured
from sensorium.model_executor.drivers.encoder_outputs import flatten_rows
from sensorium.model_executor.drivers.media_kwargs import batch_kwargs
from sensorium.multimodal.placeholder_map import IndexMap
from sensorium.worker import kv_cache
from sensorium.worker.dummy_media import DummyMedia
from sensorium.worker.kv_cache import LayerShape

logger = get_logger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference that counts as equal, relative to the largest value. A wrong row differs by about 1."""
_SHIFT = 3
"""Text tokens put in front of an item to see whether its rows depend on where it stands."""

IdArray = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class SplitObservation:
    """What `observe_split` found. With `refusal`, nothing else counts."""

    refusal: str | None = None
    placeholder_token_ids: Mapping[str, frozenset[int]] = field(default_factory=dict)
    shares_items: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EmbeddingsObservation:
    """What `observe_embeddings` found."""

    placeholder_token_ids: Mapping[str, frozenset[int]] = field(default_factory=dict)
    merges_itself: bool = False
    notes: tuple[str, ...] = ()


class _SplitCheck:
    """One model, one carrier, one dummy prompt."""

    def __init__(
        self,
        driver: AutoSplitDriver,
        model: nn.Module,
        dummy: DummyMedia,
        config: EngineConfig,
        shapes: Sequence[LayerShape],
        device: torch.device,
    ) -> None:
        self.driver, self.model, self.dummy, self.shapes, self.device = driver, model, dummy, shapes, device
        self.block_size = config.cache_config.block_size
        self.uses_mrope = config.model_config.uses_mrope
        self.dtype = config.model_config.dtype
        self.ids = dummy.token_ids
        self.in_vocabulary = np.clip(self.ids, 0, config.model_config.vocab_size - 1)
        self.kwargs = {modality: batch_kwargs(items, device, self.dtype) for modality, items in dummy.items.items()}

    def run(self) -> SplitObservation:
        plain = self._capture(self.in_vocabulary, {})
        full = self._capture(self.ids, self._all_kwargs(), self._placeholder_maps())
        if plain is None or full is None or not len(plain.rows) == len(full.rows) == len(self.ids):
            return SplitObservation(refusal="the forward pass does not hand this module one row per token")
        other = self._media_dependent_argument(plain, full)
        if other is not None:
            return SplitObservation(refusal=f"the decoder also gets {other!r}, which depends on media")
        masks = self._masks(plain, full)
        if any(not mask.any() for mask in masks.values()):
            return SplitObservation(refusal="media change no row in front of the decoder")
        media = np.logical_or.reduce(list(masks.values()))
        difference = self._chunked_difference(full, media)
        if not difference <= TOLERANCE[self.dtype]:
            return SplitObservation(
                refusal=f"split and whole runs differ by {difference:.1e} relative, expected at most "
                f"{TOLERANCE[self.dtype]:.0e}"
            )
        shares, note = self._shares_items(full, masks)
        ids = {modality: self._placeholder_ids(mask) for modality, mask in masks.items()}
        return SplitObservation(
            placeholder_token_ids={modality: found for modality, found in ids.items() if found},
            shares_items=shares,
            notes=(note,) if note else (),
        )

    def _capture(
        self, ids: IdArray, kwargs: Mapping[str, Any], maps: Mapping[str, Any] | None = None
    ) -> Captured | None:
        return self.driver.capture(ids, np.arange(len(ids), dtype=np.int64), kwargs, maps)

    def _all_kwargs(self) -> dict[str, Any]:
        return {name: value for kwargs in self.kwargs.values() for name, value in kwargs.items()}

    def _placeholder_maps(self) -> dict[str, Any] | None:
        """The map of the whole dummy prompt, where its factory said the ranges."""
        if not self.dummy.placeholders:
            return None
        maps = {}
        for modality, ranges in self.dummy.placeholders.items():
            dest = [row for each in ranges for row in range(each["offset"], each["offset"] + each["length"])]
            maps[modality] = IndexMap(src=list(range(len(dest))), dest=dest)
        return maps

    def _masks(self, plain: Captured, full: Captured) -> dict[str, Mask]:
        """Per modality, which rows its media change."""
        if len(self.kwargs) == 1:
            (modality,) = self.kwargs
            return {modality: _differs(plain.rows, full.rows)}
        masks = {}
        for modality, kwargs in self.kwargs.items():
            captured = self._capture(self.ids, kwargs, self._placeholder_maps())
            assert captured is not None
            masks[modality] = _differs(plain.rows, captured.rows)
        return masks

    @staticmethod
    def _media_dependent_argument(plain: Captured, full: Captured) -> str | None:
        for name in plain.others.keys() | full.others.keys():
            one, other = plain.others.get(name), full.others.get(name)
            if one is None or other is None or one.shape != other.shape or not torch.equal(one, other):
                return name
        return None

    def _placeholder_ids(self, mask: Mask) -> frozenset[int]:
        """Ids that stand at media rows and nowhere else; none if one stands at a text row too."""
        found = np.unique(self.ids[mask])
        if np.isin(self.ids[~mask], found).any():
            return frozenset()
        return frozenset(found.tolist())

    def _chunked_difference(self, full: Captured, media: Mask) -> float:
        """Largest relative difference between the whole pass and one cut in the middle of the media."""
        num_tokens = len(self.ids)
        whole = self._forward_whole()
        middle = int(np.flatnonzero(media)[int(media.sum()) // 2])
        cut = min(max(middle, 1), num_tokens - 1)
        caches = self._caches(num_tokens)
        pieces = [
            self.driver.forward(self._step(start, end, caches, full.rows, media))
            for start, end in ((0, cut), (cut, num_tokens))
        ]
        split = torch.cat(pieces)
        return float((split - whole).abs().max() / whole.abs().max().clamp_min(1e-12))

    def _forward_whole(self) -> torch.Tensor:
        """The model as V0 would run it: everything in one pass, media merged by the model itself."""
        num_tokens = len(self.ids)
        step = self._step(0, num_tokens, self._caches(num_tokens), None, None, self._placeholder_maps())
        hidden: torch.Tensor = ForwardAdapter(self.model)(
            input_ids=step.input_ids,
            positions=step.positions,
            kv_caches=step.kv_caches,
            attn_metadata=step.attn_metadata,
            **self._all_kwargs(),
        )
        return hidden

    def _caches(self, num_tokens: int) -> list[torch.Tensor]:
        num_blocks = -(-num_tokens // self.block_size)
        return kv_cache.allocate(self.shapes, num_blocks, self.block_size, self.dtype, self.device)

    def _step(
        self,
        start: int,
        end: int,
        caches: list[torch.Tensor],
        rows: torch.Tensor | None,
        media: Mask | None,
        maps: Mapping[str, Any] | None = None,
    ) -> StepInputs:
        query_lens = np.array([end - start], dtype=np.int32)
        seq_lens = np.array([end], dtype=np.int32)
        table = np.arange(-(-end // self.block_size), dtype=np.int32)[None]
        positions = np.arange(start, end, dtype=np.int64)
        if self.uses_mrope:
            positions = np.tile(positions, (3, 1))
        media_rows = None
        if rows is not None and media is not None and media[start:end].any():
            index = torch.from_numpy(np.flatnonzero(media[start:end])).to(self.device)
            media_rows = MediaRows(index, rows[start:end][index])
        return StepInputs(
            input_ids=torch.from_numpy(self.ids[start:end].copy()).to(self.device),
            positions=torch.from_numpy(positions).to(self.device),
            kv_caches=caches,
            attn_metadata=AttentionMetadata.from_numpy(
                query_lens,
                seq_lens,
                table,
                compute_slot_mapping(table, query_lens, seq_lens, self.block_size),
                device=self.device,
                multi_modal_placeholder_index_maps=maps,
            ),
            media=media_rows,
        )

    def _shares_items(self, full: Captured, masks: Mapping[str, Mask]) -> tuple[bool, str | None]:
        """Whether an item's rows depend on the item alone; a note if not."""
        if not self.dummy.maps_items_alone:
            return False, None
        media = np.logical_or.reduce(list(masks.values()))
        for modality, mask in masks.items():
            spans = _spans(mask, self.dummy.counts[modality])
            if spans is None:
                return False, f"{modality} items can't be told apart in the dummy prompt: not shared between prompts"
            start, end = spans[0]
            following = np.flatnonzero(media[end:])
            window = self.ids[: end + int(following[0]) if len(following) else len(self.ids)]
            before = np.flatnonzero(media[:start])
            window_start = int(before[-1]) + 1 if len(before) else 0
            kwargs = batch_kwargs(self.dummy.items[modality][:1], self.device, self.dtype)
            for shift in (0, _SHIFT):
                text = self.in_vocabulary[-1] if not media[-1] else 0
                prompt = np.concatenate([np.full(shift, text, np.int64), window[window_start:]])
                offset = shift + start - window_start
                maps = self._one_item_map(modality, offset, end - start)
                rows = self._rows_alone(prompt, kwargs, maps, offset, end - start)
                if rows is None or _relative_difference(rows, full.rows[start:end]) > TOLERANCE[self.dtype]:
                    where = "where they stand" if shift else "their neighbours"
                    return False, f"rows of {modality} items depend on {where}: not shared between prompts"
        return True, None

    def _rows_alone(
        self, prompt: IdArray, kwargs: Mapping[str, Any], maps: Mapping[str, Any], offset: int, length: int
    ) -> torch.Tensor | None:
        """Rows `[offset, offset + length)` of a prompt with one item; None if the model can't run it so."""
        try:
            captured = self._capture(prompt, kwargs, maps)
        except Exception as error:  # such as a marker of the next item, which is not in this prompt
            logger.debug("an item alone can't be run", exc_info=error)
            return None
        return None if captured is None else captured.rows[offset : offset + length]

    @staticmethod
    def _one_item_map(modality: str, offset: int, length: int) -> dict[str, Any]:
        dest = list(range(offset, offset + length))
        return {modality: IndexMap(src=list(range(length)), dest=dest)}


def observe_split(
    driver: AutoSplitDriver,
    model: nn.Module,
    dummy: DummyMedia,
    config: EngineConfig,
    shapes: Sequence[LayerShape],
    device: torch.device,
) -> SplitObservation:
    """Try a carrier out on the dummy prompt. Anything that the model raises goes to the caller."""
    return _SplitCheck(driver, model, dummy, config, shapes, device).run()


def observe_embeddings(
    driver: EmbeddingsDriver, dummy: DummyMedia, config: EngineConfig, device: torch.device
) -> EmbeddingsObservation:
    """Compare the model's merge of dummy media with putting rows at their places."""
    if len(dummy.items) != 1:
        note = "several modalities without register_placeholder_tokens: spans come from the input processor"
        return EmbeddingsObservation(notes=(note,))
    ((modality, items),) = dummy.items.items()
    dtype = config.model_config.dtype
    output = driver.call_encoder(batch_kwargs(items, device, dtype))
    rows = flatten_rows(output).to(dtype)
    ids = torch.from_numpy(dummy.token_ids.copy()).to(device)
    plain = driver.embed_ids(ids.clamp(0, config.model_config.vocab_size - 1))
    merged = driver.embed_ids(ids, output)
    mask = _differs(plain, merged)
    index = torch.from_numpy(np.flatnonzero(mask)).to(device)
    scattered = (
        len(index) == len(rows)
        and _relative_difference(plain.index_copy(0, index, rows.to(plain.dtype)), merged) <= TOLERANCE[dtype]
    )
    found = np.unique(dummy.token_ids[mask])
    unambiguous = mask.any() and not np.isin(dummy.token_ids[~mask], found).any()
    note = "the model's own merge does more than place rows: it runs for every chunk with media"
    return EmbeddingsObservation(
        placeholder_token_ids={modality: frozenset(found.tolist())} if unambiguous else {},
        merges_itself=not scattered,
        notes=() if scattered else (note,),
    )


def _differs(one: torch.Tensor, other: torch.Tensor) -> Mask:
    """`(num_rows,)`: rows that are not equal bit for bit."""
    mask: Mask = (one != other).any(dim=-1).cpu().numpy()
    return mask


def _relative_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    return float((one.float() - other.float()).abs().max() / other.float().abs().max().clamp_min(1e-12))


def _spans(mask: Mask, num_items: int) -> list[tuple[int, int]] | None:
    """`(start, end)` of each item: the runs, if there are as many, or equal parts of a run of adjacent items.

    Dummy items are all of the largest size. A wrong guess can do no harm: rows that are compared then differ.
    """
    runs = _runs(mask)
    if len(runs) == num_items:
        return runs
    num_rows, remainder = divmod(int(mask.sum()), num_items)
    if remainder:
        return None
    parts = [(start, start + num_rows) for first, last in runs for start in range(first, last, num_rows)]
    return parts if len(parts) == num_items and all(mask[start:end].all() for start, end in parts) else None


def _runs(mask: Mask) -> list[tuple[int, int]]:
    """`(start, end)` of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
