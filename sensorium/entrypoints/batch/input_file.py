"""The input of a batch run: numbered lines, bounded in length, from a file or standard input."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Self

from sensorium.errors import ConfigError


class BatchInput:
    """Lines with their numbers from 1; blank ones are left out.

    Raises:
        ConfigError: There is no such file.
    """

    def __init__(self, path: str, *, max_line_bytes: int) -> None:
        """`path` "-" is standard input. A longer line is cut short just beyond the bound."""
        self._max_line_bytes = max_line_bytes
        if path == "-":
            self._file: BinaryIO = sys.stdin.buffer
            self.num_lines: int | None = None
            return
        try:
            self.num_lines = _count_lines(path)
            self._file = open(path, "rb")  # noqa: SIM115  closed by `close`
        except OSError as error:
            hint = "Download it first." if "://" in path else "Set it."
            raise ConfigError(f"input: got {path!r}, expected a file to read ({error.strerror}). {hint}") from error

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        number = 0
        while line := self._file.readline(self._max_line_bytes + 2):
            number += 1
            whole = line
            while whole and not whole.endswith(b"\n"):  # the rest of a line that is too long, or the end
                whole = self._file.readline(1 << 20)
            if text := line.strip():
                yield number, text

    def close(self) -> None:
        """Release the file."""
        if self._file is not sys.stdin.buffer:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _count_lines(path: str) -> int:
    """Lines with something in them, for the progress bar."""
    with Path(path).open("rb") as file:
        return sum(1 for line in file if line.strip())
