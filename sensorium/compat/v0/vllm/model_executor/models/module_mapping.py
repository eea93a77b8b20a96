"""Which parts of a multimodal model are which, for adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

__all__ = ["ModelKeys", "MultiModelKeys"]

Names = str | Sequence[str] | None


@dataclass
class ModelKeys:
    """A model of one kind."""

    model_type: str = ""


@dataclass
class MultiModelKeys(ModelKeys):
    """Prefixes of the names of a model's parts."""

    language_model: list[str] = field(default_factory=list)
    connector: list[str] = field(default_factory=list)
    tower_model: list[str] = field(default_factory=list)
    generator: list[str] = field(default_factory=list)

    @classmethod
    def from_string_field(
        cls,
        language_model: Names = None,
        connector: Names = None,
        tower_model: Names = None,
        generator: Names = None,
        **kwargs: object,
    ) -> Self:
        """Each part's prefix, or several."""
        parts = (_listed(each) for each in (language_model, connector, tower_model, generator))
        return cls("", *parts)


def _listed(names: Names) -> list[str]:
    return [names] if isinstance(names, str) else list(names or ())
