"""Every command that the documentation shows is one that the command line takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from sensorium.entrypoints.cli.main import make_parser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_COMMAND = re.compile(r"^(?: {4}|[^`\n|]*\| )?(sensorium (?:[^\n\\]|\\\n)+)$", re.MULTILINE)


def commands() -> list[str]:
    found = []
    for page in PAGES:
        for match in _COMMAND.finditer(page.read_text()):
            text = match[1].replace("\\\n", " ")
            words = shlex.split(text, comments=True)
            kept = [word for word in words if word != "&"]
            found.append(shlex.join(kept[: kept.index(">")] if ">" in kept else kept))
    return [text for text in found if "--help" not in text]


def test_there_are_commands_to_check() -> None:
    names = {shlex.split(text)[1] for text in commands()}
    assert {"serve", "chat", "generate", "run-batch", "bench"} <= names


@pytest.mark.parametrize("text", commands())
def test_a_documented_command_is_understood(text: str) -> None:
    parsed = make_parser().parse_args(shlex.split(text)[1:])
    assert callable(parsed.run)
