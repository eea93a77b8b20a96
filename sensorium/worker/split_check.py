"""What running a model on dummy media shows: where its media rows stand, and whether they may be split off.

For tier 0 (`observe_split`):
- rows in front of the decoder with and without media arguments differ exactly at media rows;
- an item's rows at another offset and beside other items are equal, or the item can't be shared between prompts;
- a prompt cut in the middle of an item, with rows injected, gives the hidden states of the whole prompt.

For tier 1 (`observe_embeddings`): which tokens the model's own merge replaces, and whether it does no more than that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sensorium.attention import LayerCache
from sensorium.config import EngineConfig
from sensorium.errors import ModelError
from sensorium.logger import get_logger
from sensorium.model_executor.drivers import AutoSplitDriver, EmbeddingsDriver, MediaRows, StepInputs
from sensorium.model_executor.drivers.carrier import Captured
from sensorium.model_executor.drivers.encoder_outputs import flatten_rows
from sensorium.model_executor.drivers.media_arguments import batch_kwargs
from sensorium.multimodal.placeholder_map import IndexMap
from sensorium.worker.dummy_media import DummyMedia
from sensorium.worker.dummy_steps import DummySteps, IdArray
from sensorium.worker.trial import TOLERANCE, Trial, described, relative_difference

logger = get_logger(__name__)

_SHIFT = 3
"""Text tokens put in front of an item to see whether its rows depend on where it stands."""

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
    mixes_items: bool = False
    """An item's rows depend on what else its encoder is given, so that each is encoded alone."""
    notes: tuple[str, ...] = ()


class _SplitCheck:
    """One model, one carrier, one dummy prompt."""

    def __init__(
        self, driver: AutoSplitDriver, dummy: DummyMedia, whole: torch.Tensor, config: EngineConfig, steps: DummySteps
    ) -> None:
        self.driver, self.dummy, self.whole, self.steps = driver, dummy, whole, steps
        self.device, self.dtype = steps.device, steps.dtype
        self.ids = dummy.token_ids
        self.in_vocabulary = np.clip(self.ids, 0, config.model_config.vocab_size - 1)
        self.kwargs = dummy_kwargs(dummy, steps)

    def run(self) -> SplitObservation:
        plain = self._capture(self.in_vocabulary, {})
        full = self._capture(self.ids, joined(self.kwargs), placeholder_maps(self.dummy))
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

    def _masks(self, plain: Captured, full: Captured) -> dict[str, Mask]:
        """Per modality, which rows its media change."""
        if len(self.kwargs) == 1:
            (modality,) = self.kwargs
            return {modality: _differs(plain.rows, full.rows)}
        masks = {}
        for modality, kwargs in self.kwargs.items():
            captured = self._capture(self.ids, kwargs, placeholder_maps(self.dummy))
            assert captured is not None
            masks[modality] = _differs(plain.rows, captured.rows)
        return masks

    @staticmethod
    def _media_dependent_argument(plain: Captured, full: Captured) -> str | None:
        before, after = plain.tensors(), full.tensors()
        for name in before.keys() | after.keys():
            one, other = before.get(name), after.get(name)
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
        middle = int(np.flatnonzero(media)[int(media.sum()) // 2])
        cut = min(max(middle, 1), num_tokens - 1)
        caches = self.steps.caches(num_tokens)
        pieces = [
            self.driver.forward(self._step(start, end, caches, full.rows, media))
            for start, end in ((0, cut), (cut, num_tokens))
        ]
        return relative_difference(torch.cat(pieces), self.whole)

    def _step(self, start: int, end: int, caches: list[LayerCache], rows: torch.Tensor, media: Mask) -> StepInputs:
        media_rows = None
        if media[start:end].any():
            index = torch.from_numpy(np.flatnonzero(media[start:end])).to(self.device)
            media_rows = MediaRows(index, rows[start:end][index])
        return self.steps.step([(self.ids, start, end)], caches, media=media_rows)

    def _shares_items(self, full: Captured, masks: Mapping[str, Mask]) -> tuple[bool, str | None]:
        """Whether an item's rows depend on the item alone; a note if not."""
        if not self.dummy.maps_items_alone:
            return False, None
        media = np.logical_or.reduce(list(masks.values()))
        for modality, mask in masks.items():
            span = _first_span(mask, self.dummy.counts[modality], (self.dummy.placeholders or {}).get(modality))
            if span is None:
                return False, f"{modality} items can't be told apart in the dummy prompt: not shared between prompts"
            start, end = span
            inner = np.flatnonzero(mask[start:end])
            following = np.flatnonzero(media[end:])
            window = self.ids[: end + int(following[0]) if len(following) else len(self.ids)]
            before = np.flatnonzero(media[:start])
            window_start = int(before[-1]) + 1 if len(before) else 0
            kwargs = batch_kwargs(self.dummy.items[modality][:1], self.device, self.dtype)
            expected = full.rows[torch.from_numpy(inner + start).to(self.device)]
            for shift in (0, _SHIFT):
                text = self.in_vocabulary[-1] if not media[-1] else 0
                prompt = np.concatenate([np.full(shift, text, np.int64), window[window_start:]])
                places = inner + (shift + start - window_start)
                rows = self._rows_alone(prompt, kwargs, modality, places)
                if rows is None or relative_difference(rows, expected) > TOLERANCE[self.dtype]:
                    where = "where they stand" if shift else "their neighbours"
                    return False, f"rows of {modality} items depend on {where}: not shared between prompts"
        return True, None

    def _rows_alone(
        self, prompt: IdArray, kwargs: Mapping[str, Any], modality: str, places: IdArray
    ) -> torch.Tensor | None:
        """The rows at these places of a prompt with one item; None if the model can't run it so."""
        maps = {modality: IndexMap(src=list(range(len(places))), dest=places.tolist())}
        try:
            captured = self._capture(prompt, kwargs, maps)
        except Exception as error:  # such as a marker of the next item, which is not in this prompt
            logger.debug("an item alone can't be run", exc_info=error)
            return None
        return None if captured is None else captured.rows[torch.from_numpy(places).to(self.device)]


def observe_split(
    driver: AutoSplitDriver, dummy: DummyMedia, whole: torch.Tensor, config: EngineConfig, steps: DummySteps
) -> SplitObservation:
    """Try a carrier out on the dummy prompt, whose hidden states in one pass are `whole`.

    Anything that the model raises goes to the caller.
    """
    return _SplitCheck(driver, dummy, whole, config, steps).run()


def observe_embeddings(
    driver: EmbeddingsDriver,
    methods: tuple[str, str],
    dummy: DummyMedia,
    declared: Mapping[str, frozenset[int]],
    trial: Trial,
    steps: DummySteps,
) -> EmbeddingsObservation:
    """Encode dummy media, find where their rows stand, and run the decoder on some of them.

    Args:
        driver: Of tier 1.
        methods: Names of the model's encoder and of its embedding.
        dummy: Its dummy data.
        declared: Placeholder tokens that the class has declared.
        trial: Says what is wrong, if something is.
        steps: Makes the step for the decoder.

    Raises:
        ModelError: Encoder, merge or decoder can't be run on the model's own dummy data.
    """
    encode, _ = methods
    outputs = {
        modality: trial.encode(driver, encode, dummy, modality, kwargs)
        for modality, kwargs in dummy_kwargs(dummy, steps).items()
    }
    for modality in outputs.keys() & declared.keys():
        _check_declared(trial, dummy, modality, declared[modality], flatten_rows(outputs[modality]))
    observed = _observe_merge(driver, methods, dummy, declared, outputs, trial, steps)
    mixing = [name for name, rows in outputs.items() if _mixes_items(driver, encode, dummy, name, rows, trial, steps)]
    if not mixing:
        return observed
    note = f"{encode} gives {' and '.join(mixing)} items other rows in company: each is encoded alone"
    return replace(observed, mixes_items=True, notes=(*observed.notes, note))


def _mixes_items(
    driver: EmbeddingsDriver,
    encode: str,
    dummy: DummyMedia,
    modality: str,
    output: Any,
    trial: Trial,
    steps: DummySteps,
) -> bool:
    """Whether the first dummy item gets other rows alone than beside another (itself, if it is the only one)."""
    items = dummy.items[modality]
    if not driver.batchable or not dummy.maps_items_alone:
        return False
    rows = flatten_rows(output)
    if len(items) > 1:
        alone = trial.encode(driver, encode, dummy, modality, batch_kwargs(items[:1], steps.device, steps.dtype))
        first = flatten_rows(alone)
        return relative_difference(rows[: len(first)], first) > TOLERANCE[steps.dtype]
    try:
        twice = flatten_rows(driver.call_encoder(batch_kwargs([*items, *items], steps.device, steps.dtype)))
    except Exception as error:  # an encoder of one item
        logger.debug("two items can't be encoded in one call", exc_info=error)
        return True
    return relative_difference(twice, torch.cat([rows, rows])) > TOLERANCE[steps.dtype]


def _observe_merge(
    driver: EmbeddingsDriver,
    methods: tuple[str, str],
    dummy: DummyMedia,
    declared: Mapping[str, frozenset[int]],
    outputs: Mapping[str, Any],
    trial: Trial,
    steps: DummySteps,
) -> EmbeddingsObservation:
    """Where the model's own merge puts these outputs of its encoder, and whether it does no more than that."""
    encode, embed = methods
    if declared.keys() >= outputs.keys():
        masks = {name: np.isin(dummy.token_ids, list(declared[name])) for name in outputs}
        _run_rows(driver, dummy, outputs, masks, trial)
        return EmbeddingsObservation()
    if len(outputs) != 1:
        note = "several modalities without register_placeholder_tokens: spans come from the input processor"
        return EmbeddingsObservation(notes=(note,))
    ((modality, output),) = outputs.items()
    rows = flatten_rows(output).to(steps.dtype)
    ids = torch.from_numpy(dummy.token_ids.copy()).to(steps.device)
    plain = driver.embed_ids(ids.clamp(0, trial.vocab_size - 1))
    given = f"the rows that {encode} returned for {described(dummy, {})}, {tuple(rows.shape)}"
    with trial.blamed(embed, given, "one placeholder token in the dummy prompt for each row"):
        merged = driver.embed_ids(ids, output)
    mask = _differs(plain, merged)
    if not mask.any():
        raise ModelError(
            f"{trial.name}: {embed} returned the same with and without {given}, expected rows of media in the place "
            f"of placeholder tokens. Put multimodal_embeddings there, and placeholder tokens into the dummy prompt."
        )
    if mask.sum() < len(rows):
        raise ModelError(
            f"{trial.name}: {embed} put {int(mask.sum())} rows of media into its dummy prompt, expected {len(rows)}, "
            f"as many as {encode} returned. Make the placeholders of register_dummy_data and the encoder agree, and "
            f"merge with merge_multimodal_embeddings, which refuses a miscount."
        )
    index = torch.from_numpy(np.flatnonzero(mask)).to(steps.device)
    scattered = (
        len(index) == len(rows)
        and relative_difference(plain.index_copy(0, index, rows.to(plain.dtype)), merged) <= TOLERANCE[steps.dtype]
    )
    if scattered:
        _run_rows(driver, dummy, outputs, {modality: mask}, trial)
    found = np.unique(dummy.token_ids[mask])
    unambiguous = not np.isin(dummy.token_ids[~mask], found).any()
    note = "the model's own merge does more than place rows: it runs for every chunk with media"
    return EmbeddingsObservation(
        placeholder_token_ids={modality: frozenset(found.tolist())} if unambiguous else {},
        merges_itself=not scattered,
        notes=() if scattered else (note,),
    )


def _check_declared(trial: Trial, dummy: DummyMedia, modality: str, ids: frozenset[int], rows: torch.Tensor) -> None:
    """Refuse declared placeholder tokens of which the dummy prompt has more or fewer than there are rows."""
    num_places = int(np.isin(dummy.token_ids, list(ids)).sum())
    if num_places != len(rows):
        raise ModelError(
            f"{trial.name}: the encoder returned {len(rows)} rows for its dummy {modality} data, expected "
            f"{num_places}, the number of placeholder tokens {sorted(ids)} in its dummy prompt. Make "
            f"register_placeholder_tokens, register_dummy_data and the encoder agree."
        )


def _run_rows(
    driver: EmbeddingsDriver, dummy: DummyMedia, outputs: Mapping[str, Any], masks: Mapping[str, Mask], trial: Trial
) -> None:
    """Run the decoder on a piece of the dummy prompt that begins with rows of its first modality."""
    if not driver.merges_itself and outputs:
        first = min(masks, key=lambda name: int(np.flatnonzero(masks[name])[0]))
        trial.run_media_rows(driver, dummy, flatten_rows(outputs[first]), masks[first])


def dummy_kwargs(dummy: DummyMedia, steps: DummySteps) -> dict[str, dict[str, Any]]:
    """Per modality, the mapped arguments of all dummy items, batched."""
    return {modality: batch_kwargs(items, steps.device, steps.dtype) for modality, items in dummy.items.items()}


def joined(kwargs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The arguments of all modalities."""
    return {name: value for each in kwargs.values() for name, value in each.items()}


def placeholder_maps(dummy: DummyMedia) -> dict[str, Any] | None:
    """The map of the whole dummy prompt, where its factory said the ranges."""
    if not dummy.placeholders:
        return None
    maps = {}
    for modality, ranges in dummy.placeholders.items():
        dest = [row for each in ranges for row in range(each["offset"], each["offset"] + each["length"])]
        maps[modality] = IndexMap(src=list(range(len(dest))), dest=dest)
    return maps


def _differs(one: torch.Tensor, other: torch.Tensor) -> Mask:
    """`(num_rows,)`: rows that are not equal bit for bit."""
    mask: Mask = (one != other).any(dim=-1).cpu().numpy()
    return mask


def _first_span(mask: Mask, num_items: int, ranges: Sequence[Any] | None) -> tuple[int, int] | None:
    """`(start, end)` of the first of a modality's items; None if its rows can't be told from those of the second.

    Told by the ranges of the dummy data, or by what all dummy items have in common: they are of the largest size. Then
    each has as many runs of rows, or as many rows. A wrong guess can do no harm: rows that are compared then differ.
    """
    if ranges is not None and len(ranges) == num_items:
        first = min(ranges, key=lambda each: int(each["offset"]))
        places = np.flatnonzero(mask[: int(first["offset"]) + int(first["length"])])
        return None if not len(places) else (int(places[0]), int(places[-1]) + 1)
    found = _runs(mask)
    runs_each, runs_left = divmod(len(found), num_items)
    if not runs_left and runs_each:
        sizes = [end - start for start, end in found]
        if runs_each == 1 or sizes == sizes[:runs_each] * num_items:
            return found[0][0], found[runs_each - 1][1]
    rows_each, rows_left = divmod(int(mask.sum()), num_items)
    if rows_left:
        return None
    places = np.flatnonzero(mask)[:rows_each]
    return int(places[0]), int(places[-1]) + 1


def _runs(mask: Mask) -> list[tuple[int, int]]:
    """`(start, end)` of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
