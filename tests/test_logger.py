"""Lines of the log are ours: what clients write can't make one, hide one, or write a great many."""

from __future__ import annotations

import json
import logging

import pytest

from sensorium import logger as package_logger
from sensorium.logger import AtMostOften, JsonFormatter, TextFormatter, printable

FORGED = "2026-01-01 00:00:00,000 INFO forged"
BREAKS = ("\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "\n\n")
OTHERS = (
    "\x1b[2J\x1b[H",
    "\x1b]0;title\x07",
    "\x9b31m",
    "\x00",
    "\x08\x08",
    "\x7f",
    "\u202e",
    "\u2066",
    "\ud800",
    "\ufeff",
)


def record(message: str, *args: object, error: BaseException | None = None) -> logging.LogRecord:
    info = None if error is None else (type(error), error, error.__traceback__)
    return logging.LogRecord("sensorium.x", logging.INFO, __file__, 1, message, args, info)


@pytest.mark.parametrize("text", [*BREAKS, *OTHERS])
@pytest.mark.parametrize("formatter", [TextFormatter("%(levelname)s %(message)s"), JsonFormatter()])
def test_a_path_with_line_breaks_or_terminal_codes_stays_within_its_line(
    text: str, formatter: logging.Formatter
) -> None:
    """A client asked for `/%0A2026-01-01 00:00:00,000 INFO forged`, and so it stood in the log."""
    for line in (
        formatter.format(record("GET %s 404", f"/{text}{FORGED}")),
        formatter.format(record(f"{text}{FORGED}")),
    ):
        assert line.isprintable()
        assert len(line.splitlines()) == 1
        assert "forged" in line


@pytest.mark.parametrize("text", BREAKS)
@pytest.mark.parametrize("formatter", [TextFormatter("%(levelname)s %(message)s"), JsonFormatter()])
def test_no_line_of_an_exception_looks_like_one_of_the_log(text: str, formatter: logging.Formatter) -> None:
    try:
        raise ValueError(f"got {text}{FORGED}")
    except ValueError as error:
        written = formatter.format(record("a request failed", error=error))
    assert "forged" in written
    assert not any(line.startswith(FORGED) for line in written.splitlines())
    assert all(line.isprintable() for line in written.split("\n"))


def test_facts_of_a_text_line_are_escaped_too() -> None:
    line = record("GET / 200")
    line.facts = {"path": f"/\n{FORGED}\u2028\x1b"}
    text = TextFormatter("%(message)s").format(line)
    assert text.isprintable()
    assert json.loads(text.removeprefix("GET / 200 "))["path"] == f"/\n{FORGED}\u2028\x1b"


def test_what_prints_stays_as_it_is() -> None:
    for text in ("GET /v1/models 200", "Grüße, 世界 🙂", 'a "b" \\c'):
        assert printable(text) == text
    assert printable("a\tb\u00a0c\u200d") == r"a\tb\xa0c\u200d"


def test_a_line_that_clients_can_cause_is_written_now_and_then_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(package_logger.time, "monotonic", lambda: now_s)
    often = AtMostOften(interval_s=10.0)

    def written(text: str) -> str | None:
        line = record(text)
        return line.getMessage() if often.filter(line) else None

    for index in range(2000):
        assert written(f"line {index}")
    assert len(often._last) <= 256
    assert written("no more files") == "no more files"
    assert [written("no more files") for _ in range(1000)] == [None] * 1000
    assert written("another") == "another"
    now_s = 111.0
    assert written("no more files") == "no more files (1000 more like this in the last 11 s)"
    now_s = 130.0
    assert written("no more files") == "no more files"
