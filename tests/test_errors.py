"""Errors are told apart by what they carry, not by how their English begins."""

from __future__ import annotations

import re
from pathlib import Path

import sensorium
from sensorium.errors import InvalidRequestError, OverloadedError, SensoriumError
from sensorium.messages import RequestFailure

PACKAGE = Path(sensorium.__file__).parent
READS_ENGLISH = re.compile(
    r"str\((?:e|err|error|exc|exception|first|failure)\)\.(?:startswith|endswith|find|index)\("
    r"|\bin str\((?:e|err|error|exc|exception|first|failure)\)"
    r"|\.(?:match|search|fullmatch)\(str\("
)
EXCEPTIONS = {
    "entrypoints/openai/errors.py": "a message begins with the field at fault, which is what `param` is made of",
    "entrypoints/openai/structured_outputs.py": "quotes the reason out of a message",
    "model_executor/failures.py": "torch's errors carry nothing but their text",
}


def test_nothing_reads_the_english_of_our_errors() -> None:
    """A sentence that was put better sent errors another way: of `reasoning_effort`, and of grammars for tools."""
    found = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if READS_ENGLISH.search(path.read_text())}
    assert found == set(EXCEPTIONS)


def test_a_failure_has_what_its_error_had() -> None:
    errors: list[SensoriumError] = [
        InvalidRequestError("json: got 1, expected 2. Change json.", field="structured_outputs", code="odd"),
        OverloadedError("full: got 1, expected 0. Wait.", field="structured_outputs"),
        SensoriumError("lost"),
    ]
    for error in errors:
        failure = RequestFailure.of(error)
        assert (failure.message, failure.status, failure.code) == (str(error), error.status, error.code)
        assert failure.field == error.field
