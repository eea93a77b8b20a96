"""Finds two-way spans in a model's own masks, and how each layer treats them.

The masks of a prompt with media are evaluated at every pair of positions, and compared with the rule for text combined
with each two-way span that the engine supports: a modality's rows, or the whole prompt, seen as `SpanRule` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from sensorium.cache_spec import SpanRule
from sensorium.model_executor.models.transformers.interface import RuledMask
from sensorium.model_executor.models.transformers.mask_rules import MaskRule
from sensorium.model_executor.models.transformers.refusal import CannotRunError
from sensorium.spans import WHOLE_PROMPT, Range, Span, two_way_spans


@dataclass(frozen=True, slots=True, eq=False)
class SeenPrompt:
    """A prompt with media, as the decoder's attention calls see it."""

    modality: str
    media: np.ndarray[Any, np.dtype[np.bool_]]
    """`(num_tokens,)`: which rows are media's."""
    sights: tuple[torch.Tensor, ...]
    """For each call `(num_tokens, num_tokens)`: whether a position (row) sees another (column)."""


class MaskRecorder:
    """An `AttentionStep` that records what each call of a pass sees, and computes nothing."""

    def __init__(self) -> None:
        self.sights: list[torch.Tensor] = []

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        options: Mapping[str, Any],
    ) -> torch.Tensor:
        """See `interface.AttentionStep.attend`."""
        if not isinstance(mask, RuledMask):
            raise CannotRunError("with media, its layers make masks of their own")
        num_tokens = query.shape[2]
        zero, positions = torch.zeros((), dtype=torch.long), torch.arange(num_tokens, device=mask.device)
        zero = zero.to(mask.device)
        sight = mask.rule(zero, zero, positions[:, None], positions[None, :])
        self.sights.append(sight.expand(num_tokens, num_tokens).cpu())
        return query.new_zeros(1, num_tokens, query.shape[1], value.shape[3])


def read_two_way(
    prompts: Sequence[SeenPrompt], rules: Sequence[MaskRule]
) -> tuple[frozenset[str], tuple[SpanRule, ...]]:
    """The modalities whose rows see one another, or `WHOLE_PROMPT`, and how each attention call treats them.

    Raises:
        CannotRunError: The masks follow no supported rule.
    """
    found = [_read(prompt, rules) for prompt in prompts]
    if any(WHOLE_PROMPT in names for names, _ in found):
        found = [_read(prompt, rules, (frozenset((WHOLE_PROMPT,)),)) for prompt in prompts]
    two_way = frozenset().union(*(names for names, _ in found))
    of_calls = {spans for names, spans in found if names}
    if len(of_calls) > 1:
        raise CannotRunError("its layers see spans of different media in different ways")
    return two_way, of_calls.pop() if of_calls else (SpanRule.IGNORED,) * len(rules)


def _read(
    prompt: SeenPrompt, rules: Sequence[MaskRule], tried: Sequence[frozenset[str]] = ()
) -> tuple[frozenset[str], tuple[SpanRule, ...]]:
    num_tokens = len(prompt.media)
    options = tried or (frozenset(), frozenset((prompt.modality,)), frozenset((WHOLE_PROMPT,)))
    rows = Span.of_positions(np.flatnonzero(prompt.media))
    for names in options:
        ranges = two_way_spans(names, [((prompt.modality,), rows)], num_tokens)
        spans = [_span_rule(sight, rule, ranges) for sight, rule in zip(prompt.sights, rules, strict=True)]
        if None not in spans:
            return names, tuple(each for each in spans if each is not None)
    raise CannotRunError("with media, its attention mask is neither causal nor of spans that see one another both ways")


def _span_rule(sight: torch.Tensor, rule: MaskRule, ranges: Sequence[Range]) -> SpanRule | None:
    """How a call that sees this treats spans; None if no `SpanRule` fits."""
    base = _base(rule, len(sight))
    if torch.equal(sight, base):
        return SpanRule.IGNORED
    together = torch.zeros_like(base)
    for begin, end in ranges:
        together[begin:end, begin:end] = True
    if torch.equal(sight, base | together):
        return SpanRule.SEEN
    return SpanRule.WITHIN_REACH if torch.equal(sight, base | (together & _within(rule, len(sight)))) else None


def _within(rule: MaskRule, num_tokens: int) -> torch.Tensor:
    """`(num_tokens, num_tokens)`: whether the rule's window or chunk reaches from a position to another, whatever their
    order."""
    first = torch.tensor([rule.first_key(query) for query in range(num_tokens)])
    return torch.arange(num_tokens)[None, :] >= first[:, None]


def _base(rule: MaskRule, num_tokens: int) -> torch.Tensor:
    """What positions of text see by a rule."""
    return _within(rule, num_tokens).tril()
