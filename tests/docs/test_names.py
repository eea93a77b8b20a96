"""What docstrings, comments and pages call by a name is there.

Names were removed, and the sentences about them stayed: comments named options that there never were or no longer are.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import importlib
import io
import keyword
import re
import tokenize
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).parents[2]
FOLDERS = ("sensorium", "tests", "scripts", "benchmarks", "examples", "training")
OTHERS: Mapping[str, str] = {
    **dict.fromkeys(("video_metadata", "bytes_to_unicode", "sliding_window_overlay"), "transformers"),
    "and_masks": "torch.nn.attention.flex_attention",
    "is_global": "ipaddress",
    **dict.fromkeys(("OTEL_TRACES_SAMPLER", "OTEL_SERVICE_NAME"), "OpenTelemetry"),
}
"""Names of other libraries that nothing here uses, and whose they are; classes of models of transformers are known
anyhow.
"""
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_QUOTED = re.compile(r"(?<!`)`(\w{4,}(?:\.\w+)*)(?:\([^`\n]*\)|=)?`(?!`)")
"""A name, a dotted one, a call or a keyword; shapes, command lines, values and symbols of a few letters are none."""
_FLAG = re.compile(r"(?<![\w-])(--[a-z][a-z0-9]*(?:-[a-z0-9]+)*)(?![\w>-])")


@cache
def sources() -> Mapping[Path, str]:
    paths = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if path != Path(__file__))
    return {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in paths}


def docstrings(tree: ast.AST) -> Iterator[ast.Constant]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value


@cache
def code_and_prose() -> tuple[frozenset[str], tuple[tuple[str, str], ...]]:
    """All names that stand in code, texts included; and docstrings and comments with where they stand."""
    names = {*dir(builtins), *keyword.kwlist, *dir(transformers)}
    prose = []
    for path, source in sources().items():
        names.update(path.with_suffix("").parts)
        found = list(docstrings(ast.parse(source)))
        prose += [(f"{path}:{each.lineno}", str(each.value)) for each in found]
        at = {(each.lineno, each.col_offset) for each in found}
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                prose.append((f"{path}:{token.start[0]}", token.string))
            elif token.start not in at and tokenize.tok_name[token.type] in ("NAME", "STRING", "FSTRING_MIDDLE"):
                names.update(_WORD.findall(token.string))
    for path in (*(ROOT / "sensorium").rglob("*"), ROOT / "pyproject.toml"):
        if path.suffix in (".c", ".h", ".js", ".html", ".toml", ".json", ".jinja"):
            names.update(_WORD.findall(path.read_text(encoding="utf-8", errors="ignore")))
    return frozenset(names), tuple(prose)


@cache
def of_transformers() -> frozenset[str]:
    """Classes and functions of models, which docstrings name as their source."""
    models = Path(transformers.__file__).parent / "models"
    pattern = re.compile(r"^(?:class|def) (\w+)", re.MULTILINE)
    return frozenset(
        name for path in models.glob("*/modeling_*.py") for name in pattern.findall(path.read_text(encoding="utf-8"))
    )


def test_names_in_docstrings_and_comments_exist() -> None:
    names, prose = code_and_prose()
    names |= of_transformers()
    unknown = [
        f"{where}: `{quoted}`"
        for where, text in prose
        for quoted in _QUOTED.findall(text)
        for word in _WORD.findall(quoted)
        if word not in names and word not in OTHERS
    ]
    assert not unknown, "correct the text, or say in OTHERS whose name it is"


def test_names_of_others_are_still_spoken_of() -> None:
    prose = code_and_prose()[1]
    spoken = {word for _, text in prose for quoted in _QUOTED.findall(text) for word in _WORD.findall(quoted)}
    assert OTHERS.keys() <= spoken


@cache
def flags() -> frozenset[str]:
    """Those of all commands, and those that stand in the code of scripts."""
    found = set()
    commands = (ROOT / "sensorium/entrypoints/cli").glob("*.py")
    for command in ("main", *sorted(path.stem for path in commands if path.stem not in ("main", "__init__"))):
        fill = getattr(importlib.import_module(f"sensorium.entrypoints.cli.{command}"), "fill", None)
        if fill is not None:
            parser = argparse.ArgumentParser()
            fill(parser)
            found.update(_FLAG.findall(parser.format_help()))
    for source in sources().values():
        found.update(re.findall(r'"(--[a-z][a-z0-9-]*)"', source))
    return frozenset(found)


@pytest.mark.parametrize("folder", ["sensorium", "docs"])
def test_flags_that_are_spoken_of_exist(folder: str) -> None:
    if folder == "docs":
        pages = [(path.name, path.read_text(encoding="utf-8")) for path in (ROOT / "docs").rglob("*.md")]
    else:
        pages = [each for each in code_and_prose()[1] if each[0].startswith("sensorium")]
    assert not [f"{where}: {flag}" for where, text in pages for flag in _FLAG.findall(text) if flag not in flags()]
