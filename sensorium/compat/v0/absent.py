"""Names of V0 that have no honest meaning here, and what to use instead."""

from __future__ import annotations

REASONS: dict[str, str] = {}
"""By full name (`vllm.module.Name`), or by module for all names in it: what the message of the ImportError adds.
Without the full stop."""


def reason(module: str, name: str = "") -> str:
    """What to do about a name that isn't there."""
    parts = [*module.split("."), *([name] if name else [])]
    for count in range(len(parts), 0, -1):
        if found := REASONS.get(".".join(parts[:count])):
            return found
    return "Write what the file needs of it in the file, or beside it and import it with a dot"
