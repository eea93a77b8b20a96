"""No function is longer than a reader can hold."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import sensorium

PACKAGE = Path(sensorium.__file__).parent
MAX_LINES = 80
"""Of a function, and of what a kernel does: a kernel's arguments and constants take a line each."""


def lengths(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            is_kernel = any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            documented = isinstance(node.body[0], ast.Expr) and len(node.body) > 1
            first = node.body[1 if documented else 0].lineno if is_kernel else node.lineno
            yield f"{path.relative_to(PACKAGE)}: {node.name}", node.end_lineno - first + 1


def test_no_function_has_more_than_80_lines() -> None:
    found = [each for path in sorted(PACKAGE.rglob("*.py")) for each in lengths(path)]
    assert len(found) > 1000
    assert [(name, length) for name, length in found if length > MAX_LINES] == []
