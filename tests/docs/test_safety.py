"""Every defence on the page on safety names a test, and the test is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = re.findall(
    r"^\| .* \| `(tests/\S+\.py)::(test_\w+)` \|$", (ROOT / "docs" / "safety.md").read_text(), re.MULTILINE
)


def test_every_row_names_a_test() -> None:
    text = (ROOT / "docs" / "safety.md").read_text().split("## Many requests")[0]
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| case")]
    assert len(rows) == len(ROWS) > 40


@pytest.mark.parametrize(("file", "name"), ROWS)
def test_the_test_is_there(file: str, name: str) -> None:
    tree = ast.parse((ROOT / file).read_text())
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
