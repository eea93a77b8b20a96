"""The native CPU library: whether there is one."""

from __future__ import annotations


def native_refusal() -> str | None:
    """Why the native kernels don't run here, or `None` when they do."""
    return "not built"
