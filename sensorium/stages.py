"""The times of a request's stages: recorded where they happen, read by the server.

Nothing is recorded unless a log is open: the server opens one, for its metrics and traces; `LLM` doesn't. A log follows
its request through tasks and, by `contextvars.copy_context`, into pools of threads. Times are those of
`time.monotonic`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stage:
    """Something that took time."""

    name: str
    """"fetch", "render", "prepare", "decode" or "map"."""
    modality: str | None
    """Of the media item that it was about."""
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end_s - self.start_s


_log: ContextVar[list[Stage] | None] = ContextVar("sensorium_stages", default=None)


@contextmanager
def stages_into(log: list[Stage]) -> Iterator[None]:
    """Note the stages of what runs inside into `log`; lists take entries of several threads."""
    token = _log.set(log)
    try:
        yield
    finally:
        _log.reset(token)


@contextmanager
def stage(name: str, modality: str | None = None) -> Iterator[None]:
    """Note how long what is inside takes, whether it succeeds or not."""
    log = _log.get()
    if log is None:
        yield
        return
    start_s = time.monotonic()
    try:
        yield
    finally:
        log.append(Stage(name, modality, start_s, time.monotonic()))
