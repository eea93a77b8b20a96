"""Small helpers that model files call: lists of one type, runs of placeholder tokens, cached tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from sensorium.logger import get_logger
from sensorium.multimodal.hf_processors import cached_get_tokenizer
from sensorium.multimodal.inputs import PlaceholderRange

logger = get_logger(__name__)

T = TypeVar("T")

_MANY_PLACEHOLDERS = 16
"""More placeholders than this in a prompt's text look like a prompt that was expanded by hand."""

__all__ = [
    "cached_get_tokenizer",
    "consecutive_placeholder_ranges",
    "is_list_of",
    "repeat_and_pad_placeholder_tokens",
    "repeat_and_pad_token",
]


def is_list_of(value: object, typ: type | tuple[type, ...], *, check: Literal["first", "all"] = "first") -> bool:
    """Whether `value` is a list whose first member, or all, are instances of `typ`; an empty list is."""
    if not isinstance(value, list):
        return False
    return all(isinstance(item, typ) for item in (value[:1] if check == "first" else value))


def repeat_and_pad_token(
    token: T, *, repeat_count: int = 1, pad_token_left: T | None = None, pad_token_right: T | None = None
) -> list[T]:
    """`token` repeated, between an optional token on each side."""
    left = [] if pad_token_left is None else [pad_token_left]
    right = [] if pad_token_right is None else [pad_token_right]
    return [*left, *([token] * repeat_count), *right]


def consecutive_placeholder_ranges(num_items: int, item_size: int, initial_offset: int = 0) -> list[PlaceholderRange]:
    """Ranges of `num_items` items of `item_size` tokens each, one behind the other."""
    return [PlaceholderRange(offset=initial_offset + i * item_size, length=item_size) for i in range(num_items)]


def repeat_and_pad_placeholder_tokens(
    tokenizer: Any,
    prompt: str | None,
    prompt_token_ids: Sequence[int],
    *,
    placeholder_token_id: int,
    repeat_count: int | list[int],
    pad_token_left: int | None = None,
    pad_token_right: int | None = None,
) -> tuple[str | None, list[int], list[PlaceholderRange]]:
    """Expand the k-th occurrence of a placeholder token to `repeat_count[k]` of them, in the ids and in the text.

    An int as `repeat_count` means one item; occurrences behind the last item stay as they are. The ranges cover the
    pads too, so a `length` may exceed the item's number of embedding rows. For example, with 7 as placeholder,
    `[1, 7, 2, 7]` and `[3, 2]` become `[1, 7, 7, 7, 2, 7, 7]` with ranges (1, 3) and (5, 2).

    If the text has fewer placeholders than there are items, the surplus counts are dropped with a warning.
    """
    counts = [repeat_count] if isinstance(repeat_count, int) else list(repeat_count)
    new_prompt = None
    if prompt is not None:
        decode: Callable[[int], str] = tokenizer.decode
        placeholder = decode(placeholder_token_id)
        left = None if pad_token_left is None else decode(pad_token_left)
        right = None if pad_token_right is None else decode(pad_token_right)
        counts = counts[: _count_in_text(prompt, placeholder, len(counts))]
        parts = prompt.split(placeholder, maxsplit=len(counts))
        pieces = [parts[0]]
        for count, text in zip(counts, parts[1:], strict=True):
            pieces += repeat_and_pad_token(placeholder, repeat_count=count, pad_token_left=left, pad_token_right=right)
            pieces.append(text)
        new_prompt = "".join(pieces)

    new_ids: list[int] = []
    ranges: list[PlaceholderRange] = []
    for token in prompt_token_ids:
        if token != placeholder_token_id or len(ranges) == len(counts):
            new_ids.append(token)
            continue
        expansion = repeat_and_pad_token(
            token,
            repeat_count=counts[len(ranges)],
            pad_token_left=pad_token_left,
            pad_token_right=pad_token_right,
        )
        ranges.append(PlaceholderRange(offset=len(new_ids), length=len(expansion)))
        new_ids.extend(expansion)
    return new_prompt, new_ids, ranges


def _count_in_text(prompt: str, placeholder: str, num_items: int) -> int:
    """Placeholders in the text that get an item; warns where their number looks wrong."""
    found = prompt.count(placeholder)
    if found > _MANY_PLACEHOLDERS:
        logger.warning(
            "The prompt repeats %r %d times. Write it once for each item, as the model's page on Hugging Face "
            "does: it is expanded for you.",
            placeholder,
            found,
        )
    if found < num_items:
        logger.warning(
            "The prompt has %d placeholders %r for %d media items; the surplus items have no place in it.",
            found,
            placeholder,
            num_items,
        )
    return min(found, num_items)
