"""Anonymous files: memory that processes share, which is freed when the last of them ends."""

from __future__ import annotations

import os
import tempfile


def anonymous_file(data: bytes = b"", size_bytes: int = 0) -> int:
    """An open file without a name that holds `data`, or `size_bytes` zeros: in memory where the system can do that.

    Its position is at the beginning. The caller closes it.
    """
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("sensorium")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    write_all(fd, data, 0)
    if size_bytes:
        os.ftruncate(fd, size_bytes)
    return fd


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`, wherever the position is."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(fd, rest, offset)
        rest, offset = rest[written:], offset + written
