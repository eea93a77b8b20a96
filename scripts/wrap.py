"""Wraps the prose of the pages at 120 characters; tables, code and headings stay as they are.

    python -m scripts.wrap [PAGE ...]      # all pages by default

A paragraph or list item without a longer line is left alone. A test fails while a page has one.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from scripts.docs import pages

WIDTH = 120
MARKER = re.compile(r"(\s*)([-*+]|\d+\.)\s+")
"""How an item of a list begins."""
_STRUCTURE = re.compile(r"#|\||>|:::|<|!\[|\[[^]]+\]:|    |\t")
"""How lines begin that are not prose."""
_FENCE = re.compile(r"\s*```")
_UNBROKEN = re.compile(r"`[^`]+`|\[[^]]+\]\(")
"""Code, and the text of a link."""
_SPACE = "\0"


def blocks(text: str) -> Iterator[tuple[bool, list[str]]]:
    """The lines of a page in groups: paragraphs and list items (True), and everything else (False)."""
    block: list[str] = []
    is_code = is_list = False
    for line in text.splitlines():
        is_fence = _FENCE.match(line) is not None
        begins_item = MARKER.match(line) is not None and not is_code
        is_list = begins_item or (is_list and (not line or line.startswith(" ")))
        is_other = is_code or is_fence or not line.strip() or (_STRUCTURE.match(line) is not None and not is_list)
        is_code ^= is_fence
        if block and (is_other or begins_item):
            yield True, block
            block = []
        if is_other:
            yield False, [line]
        else:
            block.append(line)
    if block:
        yield True, block


def wrap_block(lines: list[str]) -> list[str]:
    """One paragraph or list item, at most `WIDTH` wide where a word allows it. Code and links are not broken."""
    if max(map(len, lines)) <= WIDTH:
        return lines
    marker = MARKER.match(lines[0])
    indent = " " * len(marker[0]) if marker else re.match(r"\s*", lines[0])[0]  # type: ignore[index]
    text = " ".join(line.strip() for line in lines)
    text = _UNBROKEN.sub(lambda span: span[0].replace(" ", _SPACE) if len(span[0]) < WIDTH else span[0], text)
    first = re.match(r"\s*", lines[0])[0]  # type: ignore[index]
    wrapped = textwrap.wrap(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    assert not any(MARKER.match(line) or _STRUCTURE.match(line.strip()) for line in wrapped[1:]), wrapped
    return [line.replace(_SPACE, " ") for line in wrapped]


def wrap(text: str) -> str:
    """A whole page."""
    lines = [line for is_prose, block in blocks(text) for line in (wrap_block(block) if is_prose else block)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, help="all by default")
    for page in parser.parse_args().pages or pages():
        page.write_text(wrap(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
