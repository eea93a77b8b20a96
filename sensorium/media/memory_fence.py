"""Limits the memory that decoding may take, by the operating system, in the decoder processes.

A container can claim any size, and the memory that a library allocates for it can't always be computed beforehand. So
memory is limited: a little while the header is read, then in proportion to what the header promises, which the budgets
have accepted by then. Beyond the limit an allocation fails, which is an error of that item.

In the caller's own process there is no limit, and `allow` does nothing.
"""

from __future__ import annotations

import resource
from pathlib import Path

_KIB = 1 << 10
_STATUS = Path("/proc/self/status")

HEADER_BYTES = 96 << 20
"""Beside the encoded bytes, for reading a header and whatever hangs on it: profiles, comments, tables."""


class _Fence:
    """Invariant: the process's soft limit on private memory is what it has by itself and what was allowed last."""

    base_bytes: int | None = None
    most_bytes: int = 0


def confine(most_bytes: int) -> None:
    """From now on this process gets no more private memory than it has and `most_bytes`, whatever `allow` says."""
    base_bytes = _private_bytes()
    if base_bytes is None:  # this system doesn't count private memory: only the deadline limits the item
        return
    _Fence.base_bytes, _Fence.most_bytes = base_bytes, most_bytes
    _set(most_bytes)


def allow(num_bytes: int) -> None:
    """Let the item that is being decoded have up to `num_bytes`, within the bound of `confine`."""
    if _Fence.base_bytes is not None:
        _set(min(num_bytes, _Fence.most_bytes))


def allow_all() -> None:
    """Let the item that is being decoded have all that `confine` allows."""
    allow(_Fence.most_bytes)


def has_grown(num_bytes: int) -> bool:
    """Whether the process keeps more than `num_bytes` beyond what it began with."""
    now_bytes = _private_bytes()
    return _Fence.base_bytes is not None and now_bytes is not None and now_bytes - _Fence.base_bytes > num_bytes


def _set(num_bytes: int) -> None:
    assert _Fence.base_bytes is not None
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (_Fence.base_bytes + num_bytes, hard))


def _private_bytes() -> int | None:
    """Private writable memory of this process, as `RLIMIT_DATA` counts it."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * _KIB for line in lines if line.startswith("VmData:")), None)
