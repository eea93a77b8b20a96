"""One request's media on their way from raw items to `MediaItem`s: identified, placed, mapped.

`MediaStage` holds what all requests share; a `RequestMedia` is made for one request and used by one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from sensorium.errors import InvalidRequestError, ProcessorError
from sensorium.messages import MediaItem
from sensorium.multimodal.alignment import align_items
from sensorium.multimodal.hashing import Identity, callable_identity, derive, group_identity, key_of
from sensorium.multimodal.item_checks import check_embeddings, embedding_rows
from sensorium.multimodal.mapping import MediaMapper, check_distinct
from sensorium.multimodal.mrope import token_id_of
from sensorium.multimodal.placeholders import is_placeholder
from sensorium.multimodal.placement import (
    Placement,
    Prompt,
    group,
    group_overlapping,
    locate,
    miscounted,
)
from sensorium.spans import Span

if TYPE_CHECKING:
    from sensorium.config import EngineConfig, ModelFeatures
    from sensorium.multimodal.registry import MultiModalRegistry

Expansion: TypeAlias = Callable[
    [Sequence[int], Mapping[str, Sequence[Mapping[str, Any]]]], tuple[list[int], Mapping[str, Any]]
]
"""A prompt and, per modality, the mapped items, to the expanded prompt and, per modality, the items' ranges in it."""

_PLAIN = (int, float, str, bool, bytes, type(None))


@dataclass(frozen=True, slots=True, eq=False)
class MediaData:
    """The items of one modality, in the order given."""

    modality: str
    items: tuple[Any, ...]
    identities: tuple[Identity, ...]
    data: Any
    """The items in the form in which they were given, what an input processor gets: a list, or one item itself."""

    @property
    def is_bare(self) -> bool:
        """Whether the caller gave one object instead of a list."""
        return not isinstance(self.data, list)


class MediaStage:
    """What placing and mapping need to know of the model; the same for all requests.

    `placeholder_ids`: per modality, the ids that stand where its rows go: observed at load, declared, or
    named by the config. Empty where nothing is known.
    """

    def __init__(
        self,
        config: EngineConfig,
        features: ModelFeatures,
        registry: MultiModalRegistry,
        mapper: MediaMapper,
        *,
        accept_embeddings: bool = True,
    ) -> None:
        self.config = config
        self.features = features
        self.registry = registry
        self.mapper = mapper
        self.accept_embeddings = accept_embeddings
        self.hidden_size: int | None = getattr(config.model_config.hf_text_config, "hidden_size", None)
        model_class = config.model_config.model_class
        taken = {m for m in registry.modalities if registry.get_plugin(m).has_input_mapper(model_class)}
        self.placeholder_ids = {
            modality: self._placeholder_ids(modality)
            for modality in sorted(taken | features.placeholder_token_ids.keys())
        }

    def _placeholder_ids(self, modality: str) -> frozenset[int]:
        model_config = self.config.model_config
        if ids := self.features.placeholder_token_ids.get(modality):
            return ids
        if ids := self.registry.get_placeholder_token_ids(model_config, modality):
            return ids
        token_id = token_id_of(model_config.hf_config, modality)
        return frozenset() if token_id is None else frozenset({token_id})


class _ModalityMedia:
    """One modality's items as the input processor left them.

    `items`: one for each of the user's, or None where the processor made something of them as a whole.
    """

    def __init__(self, given: MediaData, value: Any, scope: Sequence[object]) -> None:
        self.modality = given.modality
        self.value = value
        self.num_items = len(given.items)
        self.is_bare = not isinstance(value, list)
        self.items: list[Any] | None = None
        if isinstance(value, list) and len(value) == self.num_items:
            self.items = value
        elif self.is_bare and given.is_bare:
            self.items = [value]
        self._given = given
        self._scope = scope
        self._identities: dict[int, Identity] = {}

    def item_identity(self, index: int) -> Identity:
        """Identity of one mapped item, which includes what the input processor made of it, if it changed it."""
        if index not in self._identities:
            assert self.items is not None
            changed = _unless_same(self.items[index], self._given.items[index])
            self._identities[index] = derive(self._given.identities[index], *self._scope, *changed)
        return self._identities[index]

    def group(self, indices: Sequence[int]) -> tuple[Any, Identity]:
        """The data of several items together, all of them mostly, and their identity."""
        if len(indices) < self.num_items and self.items is not None:
            return [self.items[i] for i in indices], group_identity([self.item_identity(i) for i in indices])
        changed = _unless_same(self.value, self._given.data)
        return self.value, derive(group_identity(self._given.identities), *self._scope, *changed)


def _unless_same(processed: Any, given: Any) -> tuple[Any, ...]:
    return () if _same(processed, given) else (processed,)


def _same(one: Any, other: Any) -> bool:
    """Whether two values are the same objects in containers of the same shape."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, _PLAIN) and bool(one == other)


class RequestMedia:
    """The media of one request after its input processor ran.

    Args:
        given: the caller's media.
        processed: the inputs that the processor returned.
        mm_processor_kwargs: those of the request.
        cache_salt: requests share items only with the same salt.

    Raises:
        ProcessorError: (a `RuntimeError`) The processor lost media, or made some of its own.
    """

    def __init__(
        self,
        stage: MediaStage,
        given: Sequence[MediaData],
        processed: Mapping[str, Any],
        mm_processor_kwargs: Mapping[str, Any],
        cache_salt: str | None,
    ) -> None:
        self._stage = stage
        self._kwargs = {**mm_processor_kwargs, **(processed.get("mm_processor_kwargs") or {})}
        self._premapped: Mapping[str, Any] | None = processed.get("multi_modal_inputs")
        self._ranges: Mapping[str, Any] = processed.get("multi_modal_placeholders") or {}
        data = processed.get("multi_modal_data") or {}
        if self._premapped is None and data.keys() != {each.modality for each in given}:
            raise ProcessorError(
                f"input processor: got data of {sorted(data)} from it, expected {sorted(e.modality for e in given)} as "
                f"in the request. Let it return multi_modal_data."
            )
        self._salt = cache_salt
        self._media = {
            each.modality: _ModalityMedia(each, data.get(each.modality, each.data), self._scope(each.modality))
            for each in given
        }
        self._mapped: dict[str, list[Mapping[str, Any]]] = {}

    def _scope(self, modality: str) -> tuple[object, ...]:
        """What an item's rows depend on beside the item."""
        model_config = self._stage.config.model_config
        plugin = self._stage.registry.get_plugin(modality)
        if plugin.has_input_mapper(model_config.model_class):
            mapper = callable_identity(plugin.get_input_mapper(model_config.model_class))
        else:
            mapper = ()
        kwargs = {**(model_config.mm_processor_kwargs or {}), **self._kwargs}
        return modality, model_config.model, model_config.revision, kwargs, mapper, self._salt

    def expanded(self, expand: Expansion, token_ids: Sequence[int]) -> list[int]:
        """The prompt as `expand` makes it of the mapped items, whose ranges are noted. Raises what it raises."""
        mapped = {modality: self._map_items(media) for modality, media in self._media.items()}
        after, self._ranges = expand(token_ids, mapped)
        return after

    # Placing

    def place(self, prompt: Prompt) -> list[Placement]:
        """Where each item stands, in order of offset.

        Raises `InvalidRequestError` (a `ValueError`) if places and items don't match,
        `UnsupportedFeatureError` if this model can't take them in the order in which they stand.
        """
        placements: list[Placement] = []
        aligned = cache(lambda: self._aligned(prompt))
        for media in self._media.values():
            found = locate(
                media.modality,
                media.num_items,
                prompt,
                self._stage.placeholder_ids.get(media.modality, frozenset()),
                ranges=self._ranges.get(media.modality),
                rows_hint=lambda total, media=media: self._rows_hint(media, total),  # type: ignore[misc]
                spans_hint=lambda media=media: aligned().get(media.modality),  # type: ignore[misc]
            )
            if not found:
                return [self._everywhere(media, prompt)]
            if len(found) > 1 and not self._maps_alone(media):
                found = [group(found, len(prompt.after))]
            placements += found
        may_group = self._stage.features.tier.startswith("0")
        if self._premapped is not None and len(placements) > 1:
            return [group(placements, len(prompt.after))]
        return group_overlapping(placements, len(prompt.after), may_group=may_group)

    def _aligned(self, prompt: Prompt) -> dict[str, list[Span]]:
        """Spans of all items, as the prompt before its expansion determines them; empty where it doesn't."""
        masks = {
            modality: (is_placeholder(prompt.before, ids), is_placeholder(prompt.after, ids))
            for modality in self._media
            if (ids := self._stage.placeholder_ids.get(modality, frozenset()))
        }
        counts = {modality: int(before.sum()) for modality, (before, _) in masks.items()}
        overlaps = sum(after.astype(np.int64) for _, after in masks.values())
        if counts != {name: media.num_items for name, media in self._media.items()} or np.any(overlaps > 1):
            return {}
        return align_items(prompt.before, prompt.after, masks) or {}

    def _maps_alone(self, media: _ModalityMedia) -> bool:
        return media.items is not None and self._stage.features.maps_items_alone

    def _everywhere(self, unplaced: _ModalityMedia, prompt: Prompt) -> Placement:
        """One placement of all media over the whole prompt: right for a model that computes text and media in one
        piece.

        Raises `InvalidRequestError` (a `ValueError`) for other models.
        """
        if self._stage.features.splits_media:
            raise miscounted(unplaced.modality, 0, unplaced.num_items)
        indices = tuple(tuple(range(media.num_items)) for media in self._media.values())
        return Placement(tuple(self._media), indices, Span(0, len(prompt.after)))

    def _rows_hint(self, media: _ModalityMedia, total: int) -> list[int] | None:
        """Rows of each item, if they are known: every item has the most that an item may have, or embeddings or grids
        tell."""
        most = self._stage.features.max_item_rows.get(media.modality, 0)
        if total == most * media.num_items:
            return [most] * media.num_items
        if not self._maps_alone(media):
            return None
        rows = [self._rows_of(media.modality, kwargs) for kwargs in self._map_items(media)]
        return [each for each in rows if each is not None] if None not in rows else None

    def _rows_of(self, modality: str, kwargs: Mapping[str, Any]) -> int | None:
        rows = embedding_rows(kwargs)
        grid = kwargs.get(f"{modality}_grid_thw")
        if rows is not None or grid is None:
            return rows
        vision_config = getattr(self._stage.config.model_config.hf_config, "vision_config", None)
        merge = getattr(vision_config, "spatial_merge_size", None)
        grid = np.asarray(grid)
        if merge is None or grid.size % 3:
            return None
        return int(grid.reshape(-1, 3).prod(axis=-1).sum()) // int(merge) ** 2

    # Mapping

    def items(self, placements: Sequence[Placement], token_ids: Any) -> tuple[MediaItem, ...]:
        """The request's media items, mapped and identified.

        Raises what mappers may raise (see `MediaMapper`), `DuplicateKeyError` (a `ValueError`) if two
        modalities' mappers return the same key, and what `check_embeddings` raises.
        """
        mapped = [self._map(placement) for placement in placements]
        by_modality: dict[str, list[Mapping[str, Any]]] = {}
        for placement, kwargs in zip(placements, mapped, strict=True):
            if len(placement.modalities) == 1:
                by_modality.setdefault(placement.modalities[0], []).append(kwargs)
        check_distinct(by_modality)
        keys = self._keys(placements, token_ids)
        return tuple(map(self._item, placements, mapped, keys))

    def _item(self, placement: Placement, kwargs: Mapping[str, Any], key: str) -> MediaItem:
        modality, span = "+".join(placement.modalities), placement.span
        accepted = self._stage.accept_embeddings
        cross_rows = self._cross_rows(placement, kwargs)
        # Of several modalities in one span, some may be embeddings and some not: their rows can't be counted here.
        num_rows = (cross_rows or span.num_rows) if len(placement.modalities) == 1 else None
        check_embeddings(modality, kwargs, num_rows, self._stage.hidden_size, accepted=accepted)
        return MediaItem(
            modality=modality,
            key=key,
            span=span,
            kwargs=kwargs,
            index=placement.indices[0][0],
            cross_rows=cross_rows,
            seen_rows=self._seen_rows(placement, kwargs, cross_rows),
        )

    def _cross_rows(self, placement: Placement, kwargs: Mapping[str, Any]) -> int:
        """Rows that cross-attention keeps of an item; 0 for other models.

        Raises `InvalidRequestError` (a `ValueError`) for more than an item may have.
        """
        model_config = self._stage.config.model_config
        if not getattr(model_config.model_class, "supports_cross_attention", False):
            return 0
        (modality,) = placement.modalities
        model_class: Any = model_config.model_class
        num_rows = int(model_class.get_num_encoder_rows(model_config, modality, kwargs))
        most = self._stage.features.max_item_rows.get(modality, num_rows) * sum(map(len, placement.indices))
        if not 0 < num_rows <= most:
            raise InvalidRequestError(
                f"got an item of {num_rows} rows for cross-attention, expected 1 to {most}. Send a smaller one, or "
                "correct register_max_multimodal_tokens of the model class.",
                field=modality,
            )
        return num_rows

    def _seen_rows(self, placement: Placement, kwargs: Mapping[str, Any], cross_rows: int) -> int:
        """Of an item's rows for cross-attention, those that tokens behind its span see."""
        model_config = self._stage.config.model_config
        hook = getattr(model_config.model_class, "get_num_seen_rows", None)
        if not cross_rows or hook is None:
            return cross_rows
        return min(int(hook(model_config, placement.modalities[0], kwargs)), cross_rows)

    def _map(self, placement: Placement) -> Mapping[str, Any]:
        if self._premapped is not None:
            return self._premapped
        if not placement.is_group:
            media = self._media[placement.modalities[0]]
            if self._maps_alone(media):
                return self._map_items(media)[placement.indices[0][0]]
        groups = {
            modality: [self._map_group(self._media[modality], indices)]
            for modality, indices in zip(placement.modalities, placement.indices, strict=True)
        }
        check_distinct(groups)
        return {key: value for (kwargs,) in groups.values() for key, value in kwargs.items()}

    def _map_items(self, media: _ModalityMedia) -> list[Mapping[str, Any]]:
        if media.modality not in self._mapped:
            assert media.items is not None
            self._mapped[media.modality] = [
                self._stage.mapper.map_item(
                    media.modality, item, media.item_identity(index), self._kwargs, is_bare=media.is_bare
                )
                for index, item in enumerate(media.items)
            ]
        return self._mapped[media.modality]

    def _map_group(self, media: _ModalityMedia, indices: Sequence[int]) -> Mapping[str, Any]:
        data, identity = media.group(indices)
        return self._stage.mapper.map_group(media.modality, data, identity, self._kwargs)

    # Identity

    def _keys(self, placements: Sequence[Placement], token_ids: Any) -> list[str]:
        """The key of each placement's rows; where rows depend on the whole prompt, so do keys."""
        identities = [self._identity(placement) for placement in placements]
        if not self._stage.features.shares_items:
            whole = group_identity(identities)
            identities = [derive(whole, token_ids, placement.span.offset) for placement in placements]
        return [key_of(identity) for identity in identities]

    def _identity(self, placement: Placement) -> Identity:
        if not placement.is_group and self._premapped is None:
            media = self._media[placement.modalities[0]]
            if self._maps_alone(media):
                return media.item_identity(placement.indices[0][0])
        members = zip(placement.modalities, placement.indices, strict=True)
        identity = group_identity([self._media[modality].group(indices)[1] for modality, indices in members])
        return identity if self._premapped is None else derive(identity, self._premapped)
