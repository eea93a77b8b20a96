"""Which runs of placeholders belong to which item, where other tokens stand between an item's own rows.

An input processor that cuts an image into tiles, or a clip into frames, writes separators between them, and then a
prompt has more runs of placeholders than items. The prompt before expansion has one placeholder for each item, and the
text between two of them is still between their expansions: that is where one item ends and the next begins.

Worked example, `P` a placeholder, `a` text, and an expansion of `<`, two runs with `|` between them, and `>`:

    before   P a P                     the text between the items is `a`
    after    < PP | PP > a < PP | P >  what stands before the first run is `<`, behind the last `>`
    gaps     |    > a <    |           only one gap is `>` + `a` + `<`: the second run is the last of the first item

Pure index arithmetic over token ids, linear in items times runs. Called by preprocessing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TypeAlias

import numpy as np

from sensorium.multimodal.placeholders import BoolArray, runs
from sensorium.spans import IntArray, Span

_Tokens: TypeAlias = tuple[int, ...]
_Fits: TypeAlias = Callable[[_Tokens, _Tokens], bool]
"""Whether a gap `(tokens)` can lie between two items with this text between their placeholders."""


def align_items(
    before: IntArray, after: IntArray, masks: Mapping[str, tuple[BoolArray, BoolArray]]
) -> dict[str, list[Span]] | None:
    """The spans of every modality's items, in order; None if the prompts allow no assignment, or several.

    Args:
        before: The prompt with one placeholder token for each item.
        after: The same prompt, expanded.
        masks: Per modality, where its placeholders stand before and after. No position is in two of them.
    """
    labels = list(masks)
    places = sorted((int(position), label) for label in labels for position in np.flatnonzero(masks[label][0]))
    pieces = sorted(
        (int(start), int(end), label) for label in labels for start, end in zip(*runs(masks[label][1]), strict=True)
    )
    if not places or len(pieces) < len(places):
        return None
    texts = [_tokens(before, one + 1, other) for (one, _), (other, _) in pairwise(places)]
    gaps = [_tokens(after, end, start) for (_, end, _), (start, _, _) in pairwise(pieces)]
    items, owners = [label for _, label in places], [label for _, _, label in pieces]
    lead = _without_prefix(_tokens(after, 0, pieces[0][0]), _tokens(before, 0, places[0][0]))
    trail = _without_suffix(_tokens(after, pieces[-1][1], len(after)), _tokens(before, places[-1][0] + 1, len(before)))
    ends = None
    if lead is not None and trail is not None:
        marks = (lead, trail)
        ends = _last_runs(items, owners, gaps, texts, lambda gap, text: gap == (*marks[1], *text, *marks[0]))
    if ends is None:
        ends = _last_runs(items, owners, gaps, texts, _contains)
    if ends is None:
        return None
    spans: dict[str, list[Span]] = {label: [] for label in labels}
    for label, (first, last) in zip(items, pairwise([-1, *ends]), strict=True):
        positions = [np.arange(start, end) for start, end, _ in pieces[first + 1 : last + 1]]
        spans[label].append(Span.of_positions(np.concatenate(positions)))
    return spans


def _last_runs(
    items: Sequence[str], owners: Sequence[str], gaps: Sequence[_Tokens], texts: Sequence[_Tokens], fits: _Fits
) -> list[int] | None:
    """The index of each item's last run, if there is exactly one way to give the runs to the items in order.

    `items`, `owners`: the modality of each item and of each run. `gaps[j]` lies between runs j and j + 1, `texts[i]`
    between the placeholders of items i and i + 1.
    """
    num_runs = len(owners)
    same_from = [0] * num_runs  # the first run of the stretch of one modality in which a run lies
    for j in range(1, num_runs):
        same_from[j] = same_from[j - 1] if owners[j] == owners[j - 1] else j
    known: dict[tuple[_Tokens, _Tokens], bool] = {}

    def is_boundary(item: int, run: int) -> bool:
        if item == len(texts):
            return run == num_runs - 1
        if run == num_runs - 1:
            return False
        key = (gaps[run], texts[item])
        if key not in known:
            known[key] = fits(*key)
        return known[key]

    # ways[i][j + 1]: in how many ways the runs up to j are those of the items up to i; ways[0] is the empty beginning.
    ways = [[1] + [0] * num_runs]
    for item, label in enumerate(items):
        sums = [0, *accumulate(ways[-1])]
        row = [0] * (num_runs + 1)
        for run in range(num_runs):
            if owners[run] == label and is_boundary(item, run):
                row[run + 1] = sums[run + 1] - sums[same_from[run]]
        ways.append(row)
    if ways[-1][num_runs] != 1:
        return None
    ends = [num_runs - 1]
    for item in range(len(items) - 1, 0, -1):
        last = ends[-1]
        ends.append(next(j for j in range(same_from[last] - 1, last) if j >= 0 and ways[item][j + 1]))
    return ends[::-1]


def _tokens(ids: IntArray, start: int, end: int) -> _Tokens:
    return tuple(ids[start:end].tolist())


def _without_prefix(tokens: _Tokens, prefix: _Tokens) -> _Tokens | None:
    return tokens[len(prefix) :] if tokens[: len(prefix)] == prefix else None


def _without_suffix(tokens: _Tokens, suffix: _Tokens) -> _Tokens | None:
    kept = len(tokens) - len(suffix)
    return tokens[:kept] if kept >= 0 and tokens[kept:] == suffix else None


def _contains(gap: _Tokens, text: _Tokens) -> bool:
    return any(gap[i : i + len(text)] == text for i in range(len(gap) - len(text) + 1))
