"""What a constrained output may do next, in a word."""

from __future__ import annotations

import enum


class RowState(enum.IntEnum):
    """What a row's mask means."""

    FREE = 0
    """The form has not begun: any token may come, and the mask says nothing."""
    HELD = 1
    """The mask says which tokens may come."""
    COMPLETE = 2
    """No token may come: the output ends."""
    FAILED = 3
    """The row can't go on."""
