"""Where one media item's rows stand in its prompt: the one place where positions become rows and rows positions.

Positions count in the expanded prompt, rows within the item. Used by the front, which finds spans, by the scheduler,
which cuts prompts into chunks, and by the worker, which puts rows into a chunk. No torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

IntArray: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Range: TypeAlias = tuple[int, int]
"""First position, and last position + 1."""
WHOLE_PROMPT = "prompt"
"""Beside names of modalities: all positions of a prompt."""


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """The positions `[offset, offset + length)` that one item, or one group of items, takes.

    Tokens that are no media may stand between its rows: separators, or text between the parts of a group. A span
    begins and ends with a row unless the input processor gave it otherwise.

    Worked example: a span at offset 10 of length 5 whose tokens 1, 2 and 4 are media has 3 rows, at positions 11, 12
    and 14. `rows_before(13)` is 2, `rows_in(12, 20)` is `range(1, 3)`, `first_row_from(13)` is 14.
    """

    offset: int
    length: int
    row_offsets: IntArray | None = None
    """`(num_rows,)`, ascending: where in the span its rows stand; None where every token of it is one."""

    @classmethod
    def of_mask(cls, offset: int, mask: Sequence[bool] | np.ndarray[Any, np.dtype[np.bool_]]) -> Span:
        """The span from `offset` on with a row where `mask` is true."""
        row_offsets = np.flatnonzero(mask)
        return cls(offset, len(mask), None if len(row_offsets) == len(mask) else row_offsets)

    @classmethod
    def of_positions(cls, positions: IntArray) -> Span:
        """The shortest span with rows at these positions, which ascend and are at least one."""
        offset, end = int(positions[0]), int(positions[-1]) + 1
        is_dense = end - offset == len(positions)
        return cls(offset, end - offset, None if is_dense else positions - offset)

    @property
    def end(self) -> int:
        """First position behind the span."""
        return self.offset + self.length

    @property
    def num_rows(self) -> int:
        """Number of rows that come from media."""
        return self.length if self.row_offsets is None else len(self.row_offsets)

    @property
    def is_dense(self) -> bool:
        """Whether every token of the span is a row."""
        return self.row_offsets is None or len(self.row_offsets) == self.length

    @property
    def rows_end(self) -> int:
        """First position behind the last row; `offset` where there is none."""
        if self.row_offsets is None:
            return self.offset + self.length
        return self.offset + (int(self.row_offsets[-1]) + 1 if len(self.row_offsets) else 0)

    @property
    def has_valid_rows(self) -> bool:
        """Whether `row_offsets` is what it should be: one axis, ascending, within the span."""
        rows = self.row_offsets
        return rows is None or (rows.ndim == 1 and bool((np.diff(rows, prepend=-1, append=self.length) > 0).all()))

    def rows_before(self, position: int) -> int:
        """How many rows stand before `position`."""
        place = position - self.offset
        if self.row_offsets is not None:
            return int(self.row_offsets.searchsorted(place))
        if place <= 0:
            return 0
        return min(place, self.length)

    def rows_in(self, begin: int, end: int) -> range:
        """The rows that stand at positions `[begin, end)`; an empty range begins at `rows_before(begin)`."""
        return range(self.rows_before(begin), self.rows_before(end))

    def first_row_from(self, position: int) -> int | None:
        """The position of the first row at `position` or behind it; None if there is none."""
        row = self.rows_before(position)
        if row == self.num_rows:
            return None
        return self.offset + (row if self.row_offsets is None else int(self.row_offsets[row]))

    def positions(self, rows: range | None = None) -> IntArray:
        """`(len(rows),)`, ascending: where consecutive rows stand; all rows if none are named."""
        first, last = (0, self.num_rows) if rows is None else (rows.start, rows.stop)
        if self.row_offsets is None:
            return np.arange(self.offset + first, self.offset + last)
        return self.row_offsets[first:last] + self.offset


def two_way_spans(
    seen: frozenset[str], media: Iterable[tuple[Collection[str], Span]], num_prompt_tokens: int
) -> tuple[Range, ...]:
    """Ranges of a prompt whose positions see one another both ways, apart from each other and in order.

    Worked example: images of 3 rows each at positions 2, 5 and 9 give (2, 8) and (9, 12), since rows that follow each
    other can't be told apart by a model that looks at the ids.

    Args:
        seen: Modalities whose rows see one another, run by run; or `WHOLE_PROMPT`.
        media: Of each item, or group of items, the modalities and the span.
        num_prompt_tokens: Tokens of the expanded prompt.
    """
    if WHOLE_PROMPT in seen:
        return ((0, num_prompt_tokens),)
    rows = [span.positions() for modalities, span in media if not seen.isdisjoint(modalities)] if seen else []
    if not rows or not (positions := np.sort(np.concatenate(rows))).size:
        return ()
    ends = np.flatnonzero(np.diff(positions) > 1)
    begins = positions[np.concatenate(([0], ends + 1))]
    return tuple(zip(begins.tolist(), (positions[np.append(ends, -1)] + 1).tolist(), strict=True))


def merged(ranges: Iterable[Range]) -> list[Range]:
    """The same positions in ranges that share none, in order. Ranges that only touch stay apart."""
    result: list[Range] = []
    for begin, end in sorted(ranges):
        if result and begin < result[-1][1]:
            result[-1] = (result[-1][0], max(result[-1][1], end))
        else:
            result.append((begin, end))
    return result
