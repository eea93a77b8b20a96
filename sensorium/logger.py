"""Logging for the whole package: one namespace, no handlers unless an entry point asks for them."""

from __future__ import annotations

import logging
import sys

_ROOT = "sensorium"
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_seen: set[tuple[str, str]] = set()


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; `name` is its `__name__`."""
    return logging.getLogger(name)


def configure(level: str = "INFO") -> None:
    """Write the package's log lines to standard error. Called by entry points, never on import."""
    root = logging.getLogger(_ROOT)
    root.setLevel(level.upper())
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(_FORMAT))
        root.addHandler(handler)


def warn_once(logger: logging.Logger, message: str) -> None:
    """Log a warning the first time that this logger meets this message."""
    key = (logger.name, message)
    if key not in _seen:
        _seen.add(key)
        logger.warning(message)
