"""The output of a batch run: appended line by line, so that a run that was cut off goes on where it was.

A record is written by one call and ends with a newline, so all lines but the last are whole, however a run ends.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import BinaryIO, Self

import msgspec

from sensorium.entrypoints.batch.records import RECORD_START, Record
from sensorium.errors import ConfigError

_decode = msgspec.json.Decoder(Record).decode


class BatchOutput:
    """The records of finished requests; more can be appended. The file is locked as long as it is open.

    Raises:
        ConfigError: The file can't be written, is in use by another run, or holds something else than records.
    """

    def __init__(self, path: str | None, *, retry_failed: bool = False) -> None:
        """`path` None is standard output. With `retry_failed`, records of failures are taken out of the file."""
        self.done_ids: set[str] = set()
        self.done_lines: set[int] = set()
        self._path = path
        if path is None:
            self._file: BinaryIO = os.fdopen(os.dup(1), "wb", buffering=0)
            return
        try:
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115  closed by `close`
        except OSError as error:
            raise ConfigError(f"output: got {path!r}, expected a file to write ({error.strerror}). Set it.") from error
        try:
            _lock(self._file, path)
            successes = self._read()
            if retry_failed:
                self._keep_only(successes)
        except BaseException:
            self.close()
            raise

    def write(self, record: Record) -> None:
        """Append a record."""
        view = memoryview(msgspec.json.encode(record) + b"\n")
        while view:
            view = view[self._file.write(view) :]

    def close(self) -> None:
        """Release the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> list[int]:
        """Read the existing records, and drop a last line that was cut off. Returns the offsets of successes."""
        self._file.seek(0)
        start, successes = 0, []
        with os.fdopen(os.dup(self._file.fileno()), "rb") as reader:
            for number, line in enumerate(reader, 1):
                if not line.endswith(b"\n"):
                    self._repair(start, line)
                    break
                record = self._record(line, number)
                self._remember(record)
                if record.is_success:
                    successes.append(start)
                start += len(line)
        self._file.seek(0, os.SEEK_END)
        return successes

    def _record(self, line: bytes, number: int) -> Record:
        try:
            return _decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise ConfigError(
                f"output: got {self._path!r}, whose line {number} is no record of a batch run, expected a new file or "
                "one that this command wrote. Set it."
            ) from None

    def _remember(self, record: Record) -> None:
        if record.error is not None:
            self.done_lines.add(record.error.line)
        elif record.custom_id is not None:
            self.done_ids.add(record.custom_id)

    def _repair(self, start: int, line: bytes) -> None:
        """Remove a record that was cut off; its request is sent again."""
        if not (line.startswith(RECORD_START) or RECORD_START.startswith(line)):
            raise ConfigError(
                f"output: got {self._path!r}, which doesn't end with a record of a batch run, expected a new file or "
                "one that this command wrote. Set it."
            )
        self._file.truncate(start)

    def _keep_only(self, starts: list[int]) -> None:
        """Drop all records but successes: write them to a new file that replaces the old one."""
        assert self._path is not None
        self.done_ids.clear()
        self.done_lines.clear()
        path = Path(self._path)
        temporary = path.with_name(path.name + ".new")
        kept = open(temporary, "w+b", buffering=0)  # noqa: SIM115  becomes the output
        with os.fdopen(os.dup(self._file.fileno()), "rb") as reader:
            for start in starts:
                reader.seek(start)
                line = reader.readline()
                kept.write(line)
                self._remember(_decode(line))
        _lock(kept, self._path)
        temporary.replace(path)
        self._file.close()
        self._file = kept


def _lock(file: BinaryIO, path: str) -> None:
    """Raises `ConfigError` if another process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"output: got {path!r}, which another run is writing. Wait for it, or set another.") from None
