"""Tests have no time-outs but that of a hang: `tests/helpers/waiting.py` says why.

httpx gives up after 5 s by itself, and a number that is generous on a quiet machine isn't on one that is busy.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = sorted(TESTS.rglob("*.py"))
ON_PURPOSE = "# gives up on purpose"
"""What a line says whose time-out is what is tested."""
CLIENTS = {"get", "post", "put", "delete", "request", "stream", "Client", "AsyncClient"}
WAITS = {"wait", "wait_for", "join", "result", "exception", "communicate"}


def hasty_lines(source: str) -> Iterator[int]:
    """Numbers of the lines on which something is waited for no longer than a number, or than httpx's own."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        name, named = node.func.attr, {each.arg: each.value for each in node.keywords}
        is_client = name in CLIENTS and isinstance(node.func.value, ast.Name) and node.func.value.id == "httpx"
        given = [named["timeout"]] if "timeout" in named else node.args if name in WAITS and len(node.args) <= 2 else []
        is_hasty = any(isinstance(each, ast.Constant) and isinstance(each.value, int | float) for each in given)
        if (is_hasty or (is_client and "timeout" not in named)) and ON_PURPOSE not in lines[node.lineno - 1]:
            yield node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_nothing_is_waited_for_no_longer_than_a_number(path: Path) -> None:
    assert list(hasty_lines(path.read_text())) == []


def test_what_is_hasty() -> None:
    hasty = ["httpx.get(url)", "httpx.Client(base_url=url, timeout=30)", "done.wait(5)", "socket.connect(a, timeout=1)"]
    patient = ["httpx.get(url, timeout=HANG_S)", "done.wait()", "done.result(HANG_S)", "client.get(url)", "','.join(a)"]
    patient += ["groups.join(device, fd, 1, 2)"]
    for text in hasty:
        assert list(hasty_lines(text)) == [1], text
        assert not list(hasty_lines(f"{text}  {ON_PURPOSE}"))
    for text in patient:
        assert not list(hasty_lines(text)), text
