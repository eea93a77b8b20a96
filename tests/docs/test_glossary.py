"""The glossary's terms are in order, and each lives where the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "glossary.md").read_text()
ROWS = [line.strip("| ").split(" | ") for line in TEXT.splitlines() if re.match(r"\| (?!term|--)", line)]


def test_rows_have_three_cells_and_stand_in_order() -> None:
    assert len(ROWS) >= 30
    assert {len(row) for row in ROWS} == {3}
    for section in TEXT.split("\n## ")[1:]:
        terms = re.findall(r"^\| ([^|]+) \|", section, re.MULTILINE)[1:]
        assert terms == sorted(terms), "the rows of a section are in the order of the alphabet"


@pytest.mark.parametrize(("term", "what", "where"), ROWS, ids=[row[0] for row in ROWS])
def test_a_term_lives_where_the_page_says(term: str, what: str, where: str) -> None:
    homes = re.findall(r"(?:`(\w+)` in )?`([\w/]+\.py)`", where)
    assert homes, "a module is named"
    for name, path in homes + [("", each) for each in re.findall(r"`([\w/]+\.py)`", what)]:
        source = (ROOT / "sensorium" / path).read_text()
        assert not name or re.search(rf"^class {name}\b", source, re.MULTILINE), f"no class {name} in {path}"
    for setting in re.findall(r"`(max_\w+)`", what):
        assert f"    {setting}: " in (ROOT / "sensorium" / "engine" / "args.py").read_text()
