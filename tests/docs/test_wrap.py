"""One width for everything that is read: 120 characters. Ruff's E501 holds it for Python; this, for pages and C."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts.docs import ROOT, pages
from scripts.wrap import WIDTH, blocks, wrap

PAGES = pages()
C_FILES = sorted((ROOT / "sensorium" / "kernels" / "cpu").glob("*.[ch]"))


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_prose_has_one_width(page: Path) -> None:
    """A line may be longer where it is one word, such as a link."""
    long = [
        line
        for is_prose, block in blocks(page.read_text())
        for line in block
        if is_prose and len(line) > WIDTH and " " in line.strip()
    ]
    assert long == [], "run: python -m scripts.wrap"


@pytest.mark.parametrize("path", C_FILES, ids=[path.name for path in C_FILES])
def test_comments_in_c_have_the_same(path: Path) -> None:
    comments = [line for line in path.read_text().splitlines() if re.match(r"\s*(/\*|\*)", line)]
    assert [line for line in comments if len(line) > WIDTH] == []


WORDS = " ".join(["word"] * 40)


def test_paragraphs_and_items_are_wrapped_and_nothing_else() -> None:
    others = f"# {WORDS}\n\n| {WORDS} |\n|---|\n\n    {WORDS}\n\n```\n{WORDS}\n```\n"
    text = f"{others}\n{WORDS}\n\n- {WORDS}\n  - {WORDS}\n1. {WORDS}\n"
    wrapped = wrap(text)
    assert wrap(wrapped) == wrapped
    long = [line.split()[0] for line in wrapped.splitlines() if len(line) > WIDTH]
    assert long == ["#", "|", "word", "word"], "a heading, a table, and code of both kinds"
    assert wrapped.split() == text.split()
    assert re.findall(r"^ *(?:-|1\.) ", wrapped, re.MULTILINE) == ["- ", "  - ", "1. "]


def test_short_lines_and_code_spans_stay_as_they_are() -> None:
    text = "One line.\nAnother line.\n"
    assert wrap(text) == text
    span = "`python -m something --with many --flags here`"
    assert span in wrap(f"{WORDS[:100]} {span} {WORDS}\n")
