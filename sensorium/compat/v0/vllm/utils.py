"""General helpers."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, TypeVar

from sensorium.logger import get_logger
from sensorium.multimodal.utils import is_list_of

__all__ = ["cdiv", "flatten_2d_lists", "identity", "is_list_of", "print_info_once", "print_warning_once"]

logger = get_logger(__name__)
T = TypeVar("T")


@cache
def print_warning_once(msg: str) -> None:
    """Log a warning, the first time that it is given."""
    logger.warning("%s", msg)


@cache
def print_info_once(msg: str) -> None:
    """Log a line, the first time that it is given."""
    logger.info("%s", msg)


def cdiv(a: int, b: int) -> int:
    """`a / b`, rounded up."""
    return -(-a // b)


def flatten_2d_lists(lists: Iterable[Iterable[T]]) -> list[T]:
    """The members of all lists, one after the other."""
    return [member for members in lists for member in members]


def identity(value: T, **kwargs: Any) -> T:
    """The value."""
    return value
