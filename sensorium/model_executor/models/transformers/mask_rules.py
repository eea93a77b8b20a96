"""Finds the rule of a mask function by evaluating it at chosen positions.

With every causal rule of transformers, position `q` sees the keys from a first one up to `q` itself. The first key as a
function of `q` identifies the rule:

    everything       0
    window of w      max(q - w + 1, 0)
    chunks of c      q // c * c

With a rule that isn't causal, a position sees all keys, or those at most `w - 1` away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from sensorium.model_executor.models.transformers.interface import MaskFunction
from sensorium.model_executor.models.transformers.refusal import CannotRunError

MAX_POSITION = 1 << 18
"""Rules are never evaluated at this position or later ones."""
_LOOK_AHEAD = 8
"""Later keys than the position's own that are evaluated."""


@dataclass(frozen=True, slots=True)
class MaskRule:
    """Which positions a position sees: all up to itself, those of a window, or those of its chunk."""

    window: int | None = None
    chunk: int | None = None
    causal: bool = True
    """Whether it sees no later positions. If not, a window reaches as far forward as back."""

    def first_key(self, query: int) -> int:
        """The first key that a query sees."""
        if self.window is not None:
            return max(query - self.window + 1, 0)
        return query // self.chunk * self.chunk if self.chunk is not None else 0


def read_rule(function: MaskFunction, max_position: int, device: torch.device | str = "cpu") -> MaskRule:
    """The rule that a mask function follows up to `max_position`; `device` is that of the tensors it may hold.

    Raises:
        CannotRunError: It follows none of these rules.
    """
    last = min(max_position, MAX_POSITION)
    first_key = partial(_first_key, function, device)
    rule = _guess(first_key, last)
    for query in {0, 1, last // 3, last // 2, last - 1, last, *_edges(rule, last)}:
        if 0 <= query <= last and first_key(query) != rule.first_key(query):
            raise CannotRunError("its attention mask is neither causal nor a window nor of chunks")
    return rule


def read_rule_both_ways(function: MaskFunction, max_position: int, device: torch.device | str = "cpu") -> MaskRule:
    """As `read_rule`, for a function that isn't causal. Raises `CannotRunError`."""
    last = min(max_position, MAX_POSITION)
    first = int(_seen(function, device, last, last + 1)[0])
    rule = MaskRule(window=None if first == 0 else last - first + 1, causal=False)
    reach = rule.window or last + 1
    for query in {0, 1, last // 3, last // 2, last - 1, last, *_edges(rule, last)}:
        if not 0 <= query <= last:
            continue
        seen = _seen(function, device, query, last + 1)
        low, high = max(query - reach + 1, 0), min(query + reach, last + 1)
        if len(seen) != high - low or int(seen[0]) != low or int(seen[-1]) != high - 1:
            raise CannotRunError("its attention mask looks ahead, and neither at everything nor in a window")
    return rule


def _guess(first_key: Callable[[int], int], last: int) -> MaskRule:
    first = first_key(last)
    if first == 0:
        return MaskRule()
    if first_key(last - 1) == first - 1:
        return MaskRule(window=last - first + 1)
    return MaskRule(chunk=first - first_key(first - 1))


def _edges(rule: MaskRule, last: int) -> tuple[int, ...]:
    """Positions around which the rule's first key changes."""
    size = rule.window or rule.chunk or last
    return size - 1, size, size + 1, 2 * size - 1, 2 * size


def _first_key(function: MaskFunction, device: torch.device | str, query: int) -> int:
    """The first key that a query sees. Checks that it sees all from there to itself, and no later ones."""
    visible = _seen(function, device, query, query + 1 + _LOOK_AHEAD)
    if len(visible) == 0 or int(visible[-1]) != query or len(visible) != query - int(visible[0]) + 1:
        raise CannotRunError("its attention mask is not causal")
    return int(visible[0])


def _seen(function: MaskFunction, device: torch.device | str, query: int, num_keys: int) -> torch.Tensor:
    """Which of the first `num_keys` keys a query sees."""
    zero = torch.zeros((), dtype=torch.long, device=device)
    keys = torch.arange(num_keys, device=device)
    try:
        seen = function(zero, zero, zero + query, keys)
    except (IndexError, RuntimeError) as error:  # it looks indices up in a table of this prompt
        raise CannotRunError("its attention mask depends on the prompt") from error
    visible = seen.expand(len(keys)).nonzero()[:, 0]
    if len(visible) == 0:
        raise CannotRunError("its attention mask hides everything from a position")
    return visible
