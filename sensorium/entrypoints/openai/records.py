"""Facts about each HTTP request: filled in while it runs, read when it has ended, for metrics, log and traces.

A record follows its request through tasks, so that nothing has to be passed along. It holds counts, names and times,
and nothing of what was asked or answered.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from sensorium.errors import RequestError, SensoriumError
from sensorium.outputs import RequestMetrics
from sensorium.stages import Stage


@dataclass(frozen=True, slots=True)
class Generation:
    """One request to the engine, at its end."""

    outcome: str
    """"finished", "failed" or "cancelled"."""
    start_s: float
    end_s: float
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_media: Mapping[str, int] = field(default_factory=dict)
    finish_reasons: tuple[str, ...] = ()
    times: RequestMetrics | None = None


@dataclass(slots=True)
class RequestRecord:
    """One HTTP request. Times are those of `time.monotonic`."""

    request_id: str
    method: str
    path: str
    start_s: float
    client: str | None = None
    trace_headers: Mapping[str, str] = field(default_factory=dict)
    """`traceparent` and `tracestate`, as they came."""
    route: str = "other"
    """The path as the routing knows it; "other" where nothing is served."""
    status: int = 0
    """0 if the client disconnected before there was an answer."""
    end_s: float = 0.0
    failure: str | None = None
    """What kind of error the client got, if it got one."""
    stages: list[Stage] = field(default_factory=list)
    generations: list[Generation] = field(default_factory=list)
    field_names: frozenset[str] = frozenset()
    """Fields that the route takes, for errors to name."""
    prompt_field: str | None = None
    """The one that holds the prompt."""
    warnings: list[str] = field(default_factory=list)
    """Warnings for the answer's head about what was not done."""

    def facts(self) -> dict[str, Any]:
        """What the log says of it."""
        facts: dict[str, Any] = {
            "request_id": self.request_id,
            "client": self.client,
            "method": self.method,
            "path": self.path[:128],
            "status": self.status,
            "seconds": round(self.end_s - self.start_s, 4),
        }
        if self.failure is not None:
            facts["failure"] = self.failure
        if trace := _TRACEPARENT.fullmatch(self.trace_headers.get("traceparent", "")):
            facts["trace_id"] = trace[1]
        return facts | self._generated()

    def _generated(self) -> dict[str, Any]:
        if not self.generations:
            return {}
        facts: dict[str, Any] = {
            "prompt_tokens": sum(each.num_prompt_tokens for each in self.generations),
            "cached_tokens": sum(each.num_cached_tokens for each in self.generations),
            "output_tokens": sum(each.num_output_tokens for each in self.generations),
            "finish_reasons": sorted({reason for each in self.generations for reason in each.finish_reasons}),
        }
        media: dict[str, int] = {}
        for each in self.generations:
            for modality, count in each.num_media.items():
                media[modality] = media.get(modality, 0) + count
        if media:
            facts["media"] = media
        firsts = [each.times.first_token_time_s for each in self.generations if each.times is not None]
        known = [first_s for first_s in firsts if first_s is not None]
        if known:
            facts["first_token_s"] = round(min(known) - self.start_s, 4)
        return facts


_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
_current: ContextVar[RequestRecord | None] = ContextVar("sensorium_request_record", default=None)


def current_record() -> RequestRecord | None:
    """The record of the HTTP request that this code serves, if it serves one."""
    return _current.get()


def begin_record(record: RequestRecord) -> None:
    """Make a record the current one, for the task and what it starts."""
    _current.set(record)


def note_body(field_names: frozenset[str], prompt_field: str | None) -> None:
    """Note in the current record which fields its route takes."""
    record = _current.get()
    if record is not None:
        record.field_names, record.prompt_field = field_names, prompt_field


def note_warning(text: str) -> None:
    """Note in the current record what its client is to be told in a `Warning` header, once for each text.

    `text`: one line of ASCII without quotes.
    """
    record = _current.get()
    if record is not None and text not in record.warnings and len(record.warnings) < _MAX_WARNINGS:
        record.warnings.append(text)


_MAX_WARNINGS = 8
_HTTP_KINDS = {
    401: "unauthorized",
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    503: "too_many_bytes_waiting",
}


def failure_kind(error: BaseException) -> str:
    """A short name for a kind of error: one for each class of this package.

    For example, `MediaTooLargeError` is "media_too_large".
    """
    if not isinstance(error, SensoriumError):
        return "internal"
    if type(error) is RequestError:
        return "request_failed" if error.status >= 500 else "invalid_request"
    if type(error).__name__ == "HttpError":
        return _HTTP_KINDS.get(error.status, f"http_{error.status}")
    name = type(error).__name__.removesuffix("Error")
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def note_failure(error: BaseException) -> None:
    """Note in the current record that its client gets this error."""
    record = _current.get()
    if record is not None:
        record.failure = failure_kind(error)
