"""The page of errors has every code with its statuses, and every class with what it derives from."""

from __future__ import annotations

import ast
import builtins
import re
from collections import defaultdict
from pathlib import Path

from sensorium import errors
from sensorium.entrypoints.openai.errors import _CODES
from sensorium.errors import SensoriumError

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "errors.md").read_text()
CLASSES = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, SensoriumError)]


def rows(section: str) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    [text] = [part for part in TEXT.split("\n## ") if part.startswith(f"{section}\n")]
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")
    ]


def statuses() -> dict[str, set[int]]:
    """By code, as the classes and the server have them."""
    found: dict[str, set[int]] = defaultdict(set)
    for each in CLASSES:
        found[each.code].add(each.status)
    for status, code in _CODES.items():
        found[code].add(status)
    return found


def codes_in_calls() -> set[str]:
    """Codes that stand in the sources, where an error is raised."""
    return {
        keyword.value.value
        for path in (ROOT / "sensorium").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "code" and isinstance(keyword.value, ast.Constant) and isinstance(keyword.value.value, str)
    }


def test_every_code_is_on_the_page_with_its_statuses() -> None:
    on_page = {
        code: set(map(int, re.findall(r"\d+", row[1])))
        for row in rows("Over HTTP")
        for code in re.findall(r"`(\w+)`", row[0])
    }
    known = statuses()
    assert set(on_page) == set(known) | codes_in_calls()
    assert {code: on_page[code] for code in known} == known
    assert all(len(row) == 4 and row[2] and row[3] for row in rows("Over HTTP")), "each says what to do"


def test_every_class_is_on_the_page_with_what_it_derives_from() -> None:
    listed = [row for section in ("From Python", "At load", "When the engine ends") for row in rows(section)]
    on_page = {row[0].strip("`"): set(re.findall(r"`(\w+)`", row[1])) for row in listed}
    own = {each.__name__: builtin_bases(each) for each in CLASSES if each is not SensoriumError}
    assert on_page == own
    codes = {row[0].strip("`"): row[2].strip("`") for row in rows("From Python")}
    assert codes == {name: getattr(errors, name).code for name in codes}


def builtin_bases(kind: type) -> set[str]:
    """The builtin exceptions among a class's ancestors by which it may be caught."""
    general = {Exception, BaseException, object}
    named = {each for each in kind.__mro__ if each.__module__ == builtins.__name__} - general
    covered = {base for each in named for base in each.__mro__[1:]}
    return {each.__name__ for each in named - covered}
