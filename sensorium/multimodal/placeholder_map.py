"""Which rows of the media embeddings go to which rows of a token batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from sensorium.errors import InvalidRequestError
from sensorium.multimodal.inputs import PlaceholderRange
from sensorium.spans import Span


class IndexMap(NamedTuple):
    """Row `src[i]` of the media embeddings belongs at row `dest[i]` of the token batch."""

    src: list[int]
    dest: list[int]


class HasMedia(Protocol):
    """A prompt with its media, as `MultiModalPlaceholderMap.from_seq_group` reads it."""

    @property
    def multi_modal_data(self) -> Mapping[str, Any] | None:
        """Media by modality."""

    @property
    def multi_modal_placeholders(self) -> Mapping[str, Sequence[PlaceholderRange]] | None:
        """Placeholder ranges by modality."""


@dataclass
class MultiModalPlaceholderMap:
    """Relates rows of one modality's flattened embeddings to rows of the token batch.

    The k-th source range and the k-th destination range have equal lengths. For example, with placeholders of four
    tokens at 0 and at 5 and the window `range(2, 7)`, rows 2-3 of the first item and 0-1 of the second are in the
    batch: `src_ranges` (2, 4), (4, 6) go to `dest_ranges` (0, 2), (3, 5), out of `src_len` 8 rows, into `dest_len` 5.
    """

    src_ranges: list[range] = field(default_factory=list)
    src_len: int = 0
    """Rows of all items that were appended, those outside the window included."""
    dest_ranges: list[range] = field(default_factory=list)
    dest_len: int = 0
    """Rows of the token batch."""

    @classmethod
    def from_seq_group(
        cls, seq_group: HasMedia, positions: range
    ) -> tuple[dict[str, Any], dict[str, MultiModalPlaceholderMap]]:
        """The media that a window of the prompt needs, and a map for each modality.

        Only items whose range meets `positions` are returned. A prompt without placeholders gets all its media, and
        no map. Raises `InvalidRequestError` (a `ValueError`) where items and ranges differ in number.
        """
        data = dict(seq_group.multi_modal_data or {})
        placeholders = seq_group.multi_modal_placeholders
        if not data or not placeholders:
            return data, {}
        maps: dict[str, MultiModalPlaceholderMap] = {}
        for modality, ranges in placeholders.items():
            items = data.pop(modality)
            maps[modality] = cls()
            needed = maps[modality].append_items_from_seq_group(
                positions, items if isinstance(items, list) else [items], ranges
            )
            if needed:
                data[modality] = needed
        return data, maps

    def append_items_from_seq_group(
        self, positions: range, multi_modal_items: list[Any], multi_modal_placeholders: Sequence[PlaceholderRange]
    ) -> list[Any]:
        """Add one prompt's items behind what is there; returns the items whose range meets `positions`.

        Raises `InvalidRequestError` (a `ValueError`) where items and ranges differ in number.
        """
        if len(multi_modal_items) != len(multi_modal_placeholders):
            raise InvalidRequestError(
                f"Media items and their placeholder ranges must have the same length: got {len(multi_modal_items)} "
                f"items and {len(multi_modal_placeholders)} ranges. Write one placeholder for each item."
            )
        needed = []
        for placeholder, item in zip(multi_modal_placeholders, multi_modal_items, strict=True):
            start, length = placeholder["offset"], placeholder["length"]
            rows = Span(start, length).rows_in(positions.start, positions.stop)
            if not rows:
                continue
            to_dest = self.dest_len + start - positions.start
            self.src_ranges.append(range(rows.start + self.src_len, rows.stop + self.src_len))
            self.dest_ranges.append(range(rows.start + to_dest, rows.stop + to_dest))
            self.src_len += length
            needed.append(item)
        self.dest_len += len(positions)
        return needed

    def extend(self, other: MultiModalPlaceholderMap) -> None:
        """Append the map of what follows in both the embeddings and the batch."""
        self.src_ranges.extend(range(r.start + self.src_len, r.stop + self.src_len) for r in other.src_ranges)
        self.dest_ranges.extend(range(r.start + self.dest_len, r.stop + self.dest_len) for r in other.dest_ranges)
        self.src_len += other.src_len
        self.dest_len += other.dest_len

    def index_map(self) -> IndexMap:
        """The ranges as two lists of row indices."""
        if sum(map(len, self.src_ranges)) != sum(map(len, self.dest_ranges)):
            raise InvalidRequestError(
                "Placeholder map: source and destination ranges must cover the same number of rows."
            )
        return IndexMap([i for r in self.src_ranges for i in r], [i for r in self.dest_ranges for i in r])
