"""Checks the values of media settings by name, before a Hugging Face processor fails on them.

Processors take what they are given and fail where they first compute with it, or not at all. Settings come from
requests, so each value is checked by its name here. Names that aren't listed are checked by the processor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sensorium.errors import InvalidRequestError

_MOST = 2**53
_EDGES = frozenset({"height", "width", "shortest_edge", "longest_edge", "max_height", "max_width"})
_MAX_CHANNELS = 4


class _Kind(NamedTuple):
    is_right: Callable[[Any], bool]
    expected: str


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MOST


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_size(value: object) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and value.keys() <= _EDGES and all(map(_is_count, value.values()))
    return _is_count(value) or (isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_count, value)))


def _is_per_channel(value: object) -> bool:
    values = value if isinstance(value, list | tuple) else [value]
    return 0 < len(values) <= _MAX_CHANNELS and all(map(_is_number, values))


def _is_spread(value: object) -> bool:
    values = value if isinstance(value, list | tuple) else [value]
    return _is_per_channel(value) and 0 not in values


_COUNT = _Kind(_is_count, "a positive integer")
_SIZE = _Kind(_is_size, f"a positive integer, or an object with some of {', '.join(sorted(_EDGES))}")
_FLAG = _Kind(lambda value: isinstance(value, bool), "true or false")
_KINDS: Mapping[str, _Kind] = {
    **dict.fromkeys(
        ("min_pixels", "max_pixels", "patch_size", "temporal_patch_size", "merge_size", "max_video_tokens"), _COUNT
    ),
    **dict.fromkeys(("size", "crop_size", "pad_size"), _SIZE),
    **dict.fromkeys(("default_to_square", "cap_pixels_per_frame"), _FLAG),
    "resample": _Kind(lambda value: _is_number(value) and value in range(6), "a filter from 0 to 5"),
    "rescale_factor": _Kind(lambda value: _is_number(value) and value > 0, "a positive number"),
    "image_mean": _Kind(_is_per_channel, "a number for each channel"),
    "image_std": _Kind(_is_spread, "a number other than 0 for each channel"),
}


def check_values(settings: Mapping[str, Any]) -> None:
    """Refuse values that no processor can use. None stands for no value.

    Raises:
        InvalidRequestError: (a `ValueError`) A value is of another type, or out of its range.
    """
    for name, value in settings.items():
        kind = _FLAG if name.startswith("do_") else _KINDS.get(name)
        if kind is not None and value is not None and not kind.is_right(value):
            raise wrong_value(name, value, kind.expected)
    least, most = settings.get("min_pixels"), settings.get("max_pixels")
    if least is not None and most is not None and least > most:
        raise wrong_value("min_pixels", least, f"at most max_pixels, which is {most}")


def wrong_value(name: str, value: object, expected: str) -> InvalidRequestError:
    """The error for a setting with a wrong value."""
    return InvalidRequestError(
        f"got {value!r:.120}, expected {expected}. Correct it in mm_processor_kwargs.",
        field=f"mm_processor_kwargs[{name!r}]",
    )
