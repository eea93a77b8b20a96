"""Turns arguments that a model writes one by one, between tags, into the text of a JSON object.

A value between tags has no type. The function's schema gives it one; without a schema, a value that is valid JSON is
JSON, and any other is a string.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sensorium.parsing.json_scanner import JsonScanner
from sensorium.parsing.reader import Reader, Steps
from sensorium.parsing.sink import Sink

_WORDS = {"True": "true", "False": "false", "None": "null"}
"""Values as Python writes them, which models do too."""


class ParameterWriter:
    """Writes the arguments of one call, parameter by parameter."""

    def __init__(self, reader: Reader, sink: Sink) -> None:
        self._reader = reader
        self._sink = sink
        self._num_written = 0

    def begin(self) -> None:
        """Begin the object."""
        self._sink.arguments("{")

    def end(self) -> None:
        """End the object."""
        self._sink.arguments("}")

    def parameter(
        self, name: str, schema: Mapping[str, Any], ends: tuple[str, ...], *, has_frame: bool = False
    ) -> Steps[str | None]:
        """Read a value up to one of `ends`, which is returned; None where the text ends.

        `has_frame`: a line break at either end belongs to the tags.
        """
        separator = ", " if self._num_written else ""
        self._num_written += 1
        self._sink.arguments(f"{separator}{json.dumps(name, ensure_ascii=False)}: ")
        if has_frame:
            yield from self._reader.take("\n")
        if is_string(schema):
            return (yield from self._stream_string(ends, has_frame=has_frame))
        pieces: list[str] = []
        end = yield from self._reader.until(ends, pieces.append)
        text = "".join(pieces)
        if has_frame:
            text = text.removesuffix("\n")
        if end is not None:
            self._sink.arguments(as_json(text))
        return end

    def _stream_string(self, ends: tuple[str, ...], *, has_frame: bool) -> Steps[str | None]:
        """Emit a string as it arrives, except for a line break that may belong to the tags."""
        held = ""

        def emit(text: str) -> None:
            nonlocal held
            text = held + text
            held = "\n" if has_frame and text.endswith("\n") else ""
            self._sink.arguments(json.dumps(text.removesuffix(held), ensure_ascii=False)[1:-1])

        self._sink.arguments('"')
        end = yield from self._reader.until(ends, emit)
        if end is not None:
            self._sink.arguments('"')
        return end


def is_string(schema: Mapping[str, Any]) -> bool:
    """Whether the schema allows only strings."""
    if "type" in schema:
        return bool(schema["type"] in ("string", ["string"]))
    options = schema.get("enum")
    return isinstance(options, list) and bool(options) and all(isinstance(each, str) for each in options)


def as_json(text: str) -> str:
    """A value as JSON: its text if that is JSON, else the text as a JSON string."""
    value = text.strip()
    value = _WORDS.get(value, value)
    scanner = JsonScanner()
    pieces: list[str] = []
    # A number is over where something else begins.
    end = scanner.feed(value + " ", 0, pieces)
    if scanner.is_done and end >= len(value):
        return "".join(pieces).strip()
    return json.dumps(text, ensure_ascii=False)
