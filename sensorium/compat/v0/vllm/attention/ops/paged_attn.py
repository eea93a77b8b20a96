"""V0's operations on its cache's memory, which has another layout here."""

from __future__ import annotations

from typing import Any, NoReturn

from sensorium.errors import ModelError

__all__ = ["PagedAttention"]


class PagedAttention:
    """Can be imported, by files that use it for one of V0's backends only. Each method raises `ModelError`."""

    @staticmethod
    def split_kv_cache(*args: Any, **kwargs: Any) -> NoReturn:
        """Refused."""
        _refuse("split_kv_cache")

    @staticmethod
    def write_to_paged_cache(*args: Any, **kwargs: Any) -> NoReturn:
        """Refused."""
        _refuse("write_to_paged_cache")


def _refuse(name: str) -> NoReturn:
    raise ModelError(
        f"PagedAttention.{name}: the class writes into V0's cache by itself, which has another layout here. Call "
        "Attention with keys and values, or leave the plug-in out if Sensorium has a class for the architecture."
    )
