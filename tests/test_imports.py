"""Imports go one way between rooms, and importing the package is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sensorium
from tests.helpers.waiting import HANG_S

PACKAGE = Path(sensorium.__file__).parent

ROOMS = (
    "compat",
    "entrypoints",
    "engine",
    "scheduler",
    "executor",
    "worker",
    "model_executor",
    "attention",
    "kernels",
)
"""From left to right: a room may import rooms to its right, and leaves."""

BELOW = {"grammar": "engine"}
"""Rooms that belong to one room alone: that one and those to its left may import them; they import no room."""

LEAVES = (
    "chat",
    "inputs",
    "multimodal",
    "media",
    "parsing",
    "ipc",
    "messages",
    "config",
    "distributed",
    "sampling_defaults",
    "pooling_params",
    "sampling_params",
    "timestamps",
    "structured_outputs",
    "outputs",
    "plugins",
    "lora",
    "checkpoint",
    "sequence",
    "settings",
    "stages",
    "cache_spec",
    "token_masks",
    "spans",
    "anonymous_file",
    "json_size",
    "logger",
    "errors",
)
"""Rooms and modules that all rooms may import. They import no room, and one another from left to right only, so that
nothing is imported in a circle."""

TOP = ("__init__", "__main__")
"""Above all rooms: what the package offers."""

WITHOUT_TORCH = (
    "sensorium",
    "sensorium.scheduler",
    "sensorium.config",
    "sensorium.messages",
    "sensorium.outputs",
    "sensorium.grammar.process",
)


def imports(path: Path) -> Iterator[str]:
    """Names of `sensorium` modules that a file imports at run time, wherever in the file."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")
        for child in block.body
        for node in ast.walk(child)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_at(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "sensorium" else None


FILES = sorted(path for path in PACKAGE.rglob("*.py") if room_at(path) not in TOP)


def importable_from(room: str) -> set[str]:
    """The rooms that a room may import, itself included."""
    if room in BELOW:
        return {room, *LEAVES}
    order = (*ROOMS, *LEAVES)
    assert room in order, f"{room} is a room that this test does not know. Give it a place in ROOMS or LEAVES."
    rooms = set(order[order.index(room) :])
    return rooms | {below for below, owner in BELOW.items() if owner in rooms}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_rooms_to_its_right(path: Path) -> None:
    """Leaves too: `inputs` and `multimodal` imported each other, and reading either meant reading both."""
    room = room_at(path)
    every = {*ROOMS, *BELOW, *LEAVES}
    wrong = {name for name in imports(path) if room_of(name) in every - importable_from(room)}
    assert not wrong, f"{room} must not import {sorted(wrong)}"


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_these_modules_load_neither_torch_nor_transformers(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'torchvision'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_S, check=True)
    assert result.stdout.strip() == "[]"
