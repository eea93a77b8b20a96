"""Errors are told apart by what they carry, not by how their English begins."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator
from pathlib import Path

import sensorium
from sensorium.errors import (
    InvalidRequestError,
    OverloadedError,
    RequestError,
    SensoriumError,
    UnregisteredModalityError,
)
from sensorium.messages import RequestFailure

PACKAGE = Path(sensorium.__file__).parent
READS_ENGLISH = re.compile(
    r"str\((?:e|err|error|exc|exception|first|failure)\)\.(?:startswith|endswith|find|index)\("
    r"|\bin str\((?:e|err|error|exc|exception|first|failure)\)"
    r"|\.(?:match|search|fullmatch)\(str\("
)
EXCEPTIONS = {"model_executor/failures.py": "torch's errors carry nothing but their text"}
FIELD_IN_FRONT = re.compile(r"(?:[a-z_]\w*|\{\})(?:\[[^\]]*\]|\.(?:\w+|\{\}))*: ")


def test_nothing_reads_the_english_of_our_errors() -> None:
    """A sentence that was put better sent errors another way: of `reasoning_effort`, and of grammars for tools."""
    found = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if READS_ENGLISH.search(path.read_text())}
    assert found == set(EXCEPTIONS)


def kinds_of_request_errors(kind: type[RequestError] = RequestError) -> set[str]:
    return {kind.__name__}.union(*map(kinds_of_request_errors, kind.__subclasses__()))


def messages(path: Path) -> Iterator[tuple[int, str]]:
    """The messages of requests' errors that a file makes, by line; `{}` for each value in them."""
    kinds = kinds_of_request_errors() | {"RequestFailure", "RowFailure"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds and node.args:
            parts = node.args[0].values if isinstance(node.args[0], ast.JoinedStr) else [node.args[0]]
            yield node.lineno, "".join(str(each.value) if isinstance(each, ast.Constant) else "{}" for each in parts)


def test_fields_are_no_part_of_messages() -> None:
    """What a client is told as `param` was read from the message; now the text is made of the field and the message."""
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {message}"
        for path in PACKAGE.rglob("*.py")
        for line, message in messages(path)
        if FIELD_IN_FRONT.match(message)
    ]
    assert not found, "give the field as `field`"


def test_a_text_is_made_of_the_field_and_the_message() -> None:
    error = InvalidRequestError("got 1, expected 2. Change it.", field="messages[0].content", reason="1 is too little")
    assert str(error) == "messages[0].content: got 1, expected 2. Change it."
    assert error.is_about("messages")
    assert not error.is_about("message")
    assert str(InvalidRequestError("too much at once.")) == "too much at once."
    assert not InvalidRequestError("messages: odd").is_about("messages")
    assert str(UnregisteredModalityError("got it", field="image")) == "image: got it", "not as KeyError shows it"
    assert str(copy.copy(error)) == str(error)


def test_a_failure_has_what_its_error_had() -> None:
    errors: list[SensoriumError] = [
        InvalidRequestError("got 1, expected 2. Change json.", field="structured_outputs.json", code="odd", reason="1"),
        OverloadedError("got 1, expected 0. Wait.", field="structured_outputs"),
        SensoriumError("lost"),
    ]
    for error in errors:
        failure = RequestFailure.of(error)
        assert (failure.message, failure.status, failure.code) == (error.message, error.status, error.code)
        assert (failure.field, failure.reason) == (error.field, error.reason)
