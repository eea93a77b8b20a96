"""Sources of weights in addition to the checkpoint itself."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DefaultModelLoader"]


class DefaultModelLoader:
    """Only its `Source` is used."""

    @dataclass
    class Source:
        """A checkpoint whose weights a class takes under a prefix."""

        model_or_path: str
        revision: str | None = None
        prefix: str = ""
        fall_back_to_pt: bool = True
        allow_patterns_overrides: list[str] | None = None
