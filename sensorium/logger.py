"""Logging for the whole package: one namespace, no handlers unless an entry point asks for them.

A line may carry facts, `logger.info("...", extra={"facts": {...}})`, and bears the id of the request that it was
written for, wherever the id is known. As text:

    2026-01-31 12:00:00,000 INFO sensorium.x: POST /v1/completions 200 {"request_id": "7f", "seconds": 0.2}

As JSON, an object a line:

    {"time": "2026-01-31T12:00:00.000+00:00", "level": "INFO", "logger": "sensorium.x", "message": "...", ...}

What a client writes may come into a line, and never makes a line of its own, nor moves a terminal's cursor: characters
that don't print are escaped, here, for all lines.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias

_ROOT = "sensorium"
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
LogLevel: TypeAlias = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
LogFormat: TypeAlias = Literal["text", "json"]
_seen: set[tuple[str, str]] = set()

request_id_of_logs: ContextVar[str | None] = ContextVar("sensorium_log_request_id", default=None)
"""The request that is being served, if one is."""


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; `name` is its `__name__`."""
    return logging.getLogger(name)


@dataclass(frozen=True, slots=True)
class LogSettings:
    """How the log is written."""

    level: LogLevel = "INFO"
    """The least important lines to write."""
    form: LogFormat = "text"
    """Lines for people, or an object a line."""


DEFAULT_LOG = LogSettings()


def configure(settings: LogSettings = DEFAULT_LOG, name: str = _ROOT) -> None:
    """Write log lines to standard error: the package's, or those of the library of that name.

    Called by entry points, never on import.
    """
    root = logging.getLogger(name)
    root.setLevel(settings.level.upper())
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonFormatter() if settings.form == "json" else TextFormatter(_FORMAT))
        root.addHandler(handler)


class TextFormatter(logging.Formatter):
    """Lines for people: the facts stand behind the message."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """See logging."""
        facts = _facts(record)
        line = printable(super().formatMessage(record))
        return f"{line} {json.dumps(facts)}" if facts else line

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """See logging. Each line is set in, so that none looks like the beginning of a message."""
        return _set_in(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802
        """See logging."""
        return _set_in(super().formatStack(stack_info))


def printable(text: str) -> str:
    """The text with everything escaped that doesn't print: line breaks of all kinds, control characters, terminal
    sequences, marks of direction, lone surrogates.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def _set_in(text: str) -> str:
    return "\n".join(f"    {printable(line)}" for line in text.split("\n"))


class JsonFormatter(logging.Formatter):
    """Lines for machines: one JSON object each."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_facts(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


_MAX_TEXTS = 256
"""Remembered by one filter."""


class AtMostOften(logging.Filter):
    """Lets a line of the same text through once in a while, and says then how many there were: what clients cause as
    often as they like doesn't fill the disk.
    """

    def __init__(self, interval_s: float = 10.0) -> None:
        super().__init__()
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._last: dict[str, tuple[float, int]] = {}
        """By text: when it was written last, and how many were left out since."""

    def filter(self, record: logging.LogRecord) -> bool:
        """See logging."""
        text = str(record.msg)
        with self._lock:
            now_s = time.monotonic()
            last_s, num_left_out = self._last.get(text, (now_s - self._interval_s, 0))
            if now_s - last_s < self._interval_s:
                self._last[text] = (last_s, num_left_out + 1)
                return False
            if len(self._last) >= _MAX_TEXTS:
                self._last.clear()
            self._last[text] = (now_s, 0)
        if num_left_out:
            record.msg = f"{text} ({num_left_out} more like this in the last {now_s - last_s:.0f} s)"
        return True


def _facts(record: logging.LogRecord) -> dict[str, Any]:
    facts: dict[str, Any] = getattr(record, "facts", {})
    request_id = request_id_of_logs.get()
    return {"request_id": request_id, **facts} if request_id is not None else facts


def warn_once(logger: logging.Logger, message: str) -> None:
    """Log a warning the first time that this logger meets this message."""
    key = (logger.name, message)
    if key not in _seen:
        _seen.add(key)
        logger.warning(message)
