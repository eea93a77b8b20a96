"""Waiting for what must happen, however long a machine takes that others keep busy.

A test never passes or fails by a time: it waits until something is so, and only what hangs gets to the end of `HANG_S`.
Where it is time itself that is tested, the time is one that a thread spent computing, or is only bounded from below.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import NoReturn

HANG_S = 600.0
"""Longer than anything takes: whoever waits so long waits for what never comes. For time-outs of clients too."""
_PAUSE_S = 0.01


def until(is_so: Callable[[], object], told: Callable[[], object] | str = "") -> None:
    """Return once it is so. `told` is what to say, or how to find out what to say, if it never is."""
    end_s = time.monotonic() + HANG_S
    while not is_so():
        if time.monotonic() > end_s:
            _fail(told)
        time.sleep(_PAUSE_S)


async def auntil(is_so: Callable[[], object], told: Callable[[], object] | str = "") -> None:
    """As `until`, while the event loop goes on."""
    end_s = time.monotonic() + HANG_S
    while not is_so():
        if time.monotonic() > end_s:
            _fail(told)
        await asyncio.sleep(_PAUSE_S)


def _fail(told: Callable[[], object] | str) -> NoReturn:
    raise AssertionError(f"not so within {HANG_S:g} s: {told() if callable(told) else told}")
