"""Decorators of classes that V0 could compile."""

from __future__ import annotations

from typing import Any

__all__ = ["support_torch_compile"]


def support_torch_compile(cls: Any = None, **options: Any) -> Any:
    """Decorator, with arguments or without: the class as it is, since steps are recorded as CUDA graphs instead."""
    return (lambda decorated: decorated) if cls is None else cls
