"""Streamed answers: from bytes to events, and from events to times and counts."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

import msgspec

from sensorium.entrypoints.bench.http_client import BrokenAnswerError

_MAX_ERROR_CHARS = 200


class EventReader:
    """Parses a stream of server-sent events as its bytes arrive.

    Source: the HTML standard, section 9.2.6, without the fields that such answers don't use.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The data of each event that `data` completes."""
        data = self._rest + data
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        *events, self._rest = data.split(b"\n\n")
        return [found for event in events if (found := _data_of(event)) is not None]


def _data_of(event: bytes) -> bytes | None:
    if b"\n" not in event:
        return event[5:].lstrip(b" ") if event.startswith(b"data:") else None
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


def _is_token(choice: _Choice) -> bool:
    """Whether an event reports a token. A token may have no text: half a character, or a special token.

    The first event of many servers only names the role, the last one only says why the answer ended.
    """
    delta = choice.delta
    if delta is None:
        return bool(choice.text) or choice.finish_reason is None
    if delta.content or delta.reasoning or delta.reasoning_content:
        return True
    return delta.role is None and choice.finish_reason is None


@dataclass(slots=True, eq=False)
class Sample:
    """The measured times of one request, in monotonic seconds."""

    start_s: float
    """When it was due to be sent: waiting for a free stream counts as waiting for the server."""
    sent_s: float = 0.0
    end_s: float = 0.0
    token_s: array[float] = field(default_factory=lambda: array("d"))
    """When each event with a token arrived. One event may hold several tokens."""
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    error: str | None = None
    """Why it failed; None for a complete answer."""

    @property
    def ttft_s(self) -> float:
        """To the first token."""
        return self.token_s[0] - self.start_s

    @property
    def e2e_s(self) -> float:
        """To the end of the answer."""
        return self.end_s - self.start_s

    @property
    def tpot_s(self) -> float | None:
        """Per token after the first, on average; None for answers of one token."""
        if self.num_output_tokens < 2:
            return None
        return (self.token_s[-1] - self.token_s[0]) / (self.num_output_tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        """Between events with tokens."""
        return [later - earlier for earlier, later in zip(self.token_s, self.token_s[1:], strict=False)]


class StreamedAnswer:
    """Fills a sample from the pieces of an answer. `take` is passed to `HttpClient` as its sink."""

    def __init__(self, sample: Sample) -> None:
        self._sample = sample
        self._events = EventReader()
        self._failure = bytearray()
        self._is_done = False

    def take(self, status: int, body: bytes, now_s: float) -> None:
        """A piece of the body. Raises `BrokenAnswerError`."""
        if status != 200:
            self._failure += body
            return
        for data in self._events.feed(body):
            self._take_event(data, now_s)

    def finish(self, status: int, now_s: float) -> None:
        """The answer has ended."""
        sample = self._sample
        sample.end_s = now_s
        if status != 200:
            sample.error = _failure(status, bytes(self._failure))
        elif sample.error is None and not (self._is_done and sample.token_s):
            sample.error = "the stream ended early" if sample.token_s else "the stream held no tokens"
        if not sample.num_output_tokens:
            sample.num_output_tokens = len(sample.token_s)

    def _take_event(self, data: bytes, now_s: float) -> None:
        sample = self._sample
        if data == b"[DONE]":
            self._is_done = True
            return
        try:
            event = _decode(data)
        except msgspec.MsgspecError as error:
            raise BrokenAnswerError("an event that is no chunk of an answer") from error
        if event.choices and _is_token(event.choices[0]):
            sample.token_s.append(now_s)
        if event.usage is not None:
            sample.num_prompt_tokens = event.usage.prompt_tokens
            sample.num_output_tokens = event.usage.completion_tokens
        if event.error is not None:
            sample.error = f"in the stream: {_message(event.error)[:_MAX_ERROR_CHARS]}"


def _message(error: object) -> str:
    """The message of an error, in OpenAI's format or another."""
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


def _failure(status: int, body: bytes) -> str:
    try:
        found = msgspec.json.decode(body)
        text = _message(found.get("error", found) if isinstance(found, dict) else found)
    except msgspec.MsgspecError:
        text = body[:_MAX_ERROR_CHARS].decode("utf-8", "replace")
    return f"status {status}: {text[:_MAX_ERROR_CHARS]}".rstrip(": ")
