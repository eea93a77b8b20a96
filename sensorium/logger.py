"""Logging for the whole package: one namespace, no handlers unless an entry point asks for them.

A line may carry facts, `logger.info("...", extra={"facts": {...}})`, and bears the id of the request that it was
written for, wherever the id is known. As text:

    2026-01-31 12:00:00,000 INFO sensorium.x: POST /v1/completions 200 {"request_id": "7f", "seconds": 0.2}

As JSON, an object a line:

    {"time": "2026-01-31T12:00:00.000+00:00", "level": "INFO", "logger": "sensorium.x", "message": "...", ...}
"""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

_ROOT = "sensorium"
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
FORMATS = ("text", "json")
_seen: set[tuple[str, str]] = set()

request_id_of_logs: ContextVar[str | None] = ContextVar("sensorium_log_request_id", default=None)
"""The request that is being served, if one is."""


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; `name` is its `__name__`."""
    return logging.getLogger(name)


@dataclass(frozen=True, slots=True)
class LogSettings:
    """How the log is written."""

    level: str = "INFO"
    """The least important lines to write."""
    form: str = "text"
    """One of `FORMATS`."""


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
        line = super().formatMessage(record)
        return f"{line} {json.dumps(facts)}" if facts else line


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
