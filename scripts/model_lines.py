"""Counts the lines of each model file here and of vLLM's for the same architecture, and writes the table of
docs/architecture.md. Downloads vLLM's newest wheel from the package index and reads it; nothing of it is installed or
kept but the numbers.

    PYTHONPATH=. python scripts/model_lines.py [WHEEL]
"""

from __future__ import annotations

import ast
import datetime as dt
import io
import subprocess
import sys
import tempfile
import tokenize
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from scripts.wrap import wrap
from sensorium.model_executor.models.registry import IN_TREE

PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
HEADING = "## Lines of a model file"
OURS, THEIRS = "sensorium/model_executor/models", "vllm/model_executor/models"
_NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        wheel = Path(sys.argv[1]) if sys.argv[1:] else downloaded(Path(folder))
        version = wheel.name.split("-")[1]
        theirs = files_of_wheel(wheel)
    root = PAGE.parents[1]
    ours = {path.relative_to(root).as_posix(): path.read_text() for path in (root / OURS).rglob("*.py")}
    PAGE.write_text(with_section(PAGE.read_text(), section(ours, theirs, version)), encoding="utf-8")


def downloaded(folder: Path) -> Path:
    """vLLM's newest wheel, without what it needs."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
    ]
    subprocess.run([*pip, "vllm"], check=True)
    [wheel] = folder.glob("*.whl")
    return wheel


def files_of_wheel(wheel: Path) -> dict[str, str]:
    """Sources of the folder of models, by path."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(f"{THEIRS}/") and name.endswith(".py")]
        return {name: archive.read(name).decode() for name in names}


def classes_of_vllm(registry: str) -> dict[str, str]:
    """By architecture, the path of the file that vLLM's registry names: entries `"Name": ("module", "Class")`."""
    found: dict[str, str] = {}
    for node in ast.walk(ast.parse(registry)):
        if not isinstance(node, ast.Dict):
            continue
        for key, value in zip(node.keys, node.values, strict=True):
            if not (isinstance(key, ast.Constant) and isinstance(value, ast.Tuple) and len(value.elts) == 2):
                continue
            module = value.elts[0]
            if isinstance(module, ast.Constant) and isinstance(module.value, str):
                found.setdefault(str(key.value), f"{THEIRS}/{module.value.replace('.', '/')}.py")
    return found


def lines_of_code(source: str) -> int:
    """Counts the lines that aren't comments, docstrings or blank."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def with_imports(path: str, files: Mapping[str, str]) -> set[str]:
    """A file, and all files in the folder of models that it imports, directly or indirectly."""
    found, waiting = {path}, [path]
    while waiting:
        current = waiting.pop()
        new = {name for name in imported(current, files[current]) if name in files} - found
        found |= new
        waiting += new
    return found


def imported(path: str, source: str) -> Iterator[str]:
    """Paths of the modules that a file imports, as they would be."""
    folder = PurePosixPath(path).parent
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom):
            continue
        base = PurePosixPath(*(node.module or "").split("."))
        if node.level:
            base = PurePosixPath(*folder.parts[: len(folder.parts) - node.level + 1]) / base
        yield f"{base}.py"
        yield from (f"{base / each.name}.py" for each in node.names)


def section(ours: Mapping[str, str], theirs: Mapping[str, str], version: str) -> str:
    """The heading, what is counted, and the table."""
    registry = classes_of_vllm(theirs[f"{THEIRS}/registry.py"])
    rows, alone, together = [], [0, 0], [0, 0]
    for architecture, target in sorted(IN_TREE.items()):
        own = f"{target.partition(':')[0].replace('.', '/')}.py"
        other = registry.get(architecture)
        numbers = [count({own}, ours), None, count(with_imports(own, ours), ours), None]
        if other in theirs:
            numbers[1::2] = count({other}, theirs), count(with_imports(other, theirs), theirs)
            alone = [alone[0] + numbers[0], alone[1] + numbers[1]]
            together = [together[0] + numbers[2], together[1] + numbers[3]]
        cells = ("" if number is None else f"{number:,}" for number in numbers)
        rows.append(f"| `{architecture}` | {' | '.join(cells)} |")
    date = dt.datetime.now(tz=dt.UTC).date().isoformat()
    shares = [f"{own / other:.0%}" for own, other in (alone, together)]
    text = (
        f"{HEADING}\n\nLines with code (no comments, docstrings, blanks) of the file with the architecture's class, "
        "and of that and the files of the folder of models that it imports, directly or not: towers, decoders, "
        "helpers. "
        f"Beside them those of vLLM {version}, where its registry names a file. Counted on {date} by "
        "`python scripts/model_lines.py`. Folders of layers are counted on neither side: the blocks of all decoders "
        "here are in `layers/decoder.py`. vLLM's files also do what this engine has no part in, such as stages of a "
        "pipeline and its own speculative heads. Over the architectures that both have, a file here has "
        f"{shares[0]} of the lines of vLLM's, and with what it imports {shares[1]}.\n\n"
    )
    head = "| architecture | file here | vLLM's file | with imports | vLLM's with imports |\n|---|--:|--:|--:|--:|\n"
    return wrap(text + head + "\n".join(rows) + "\n")


def count(paths: set[str], files: Mapping[str, str]) -> int:
    return sum(lines_of_code(files[path]) for path in paths)


def with_section(page: str, text: str) -> str:
    """The page with the section in the place of the one that it has, or at its end."""
    before, found, rest = page.partition(HEADING)
    if not found:
        return f"{page.rstrip()}\n\n{text}"
    _, next_heading, after = rest.partition("\n#")
    return f"{before}{text}{next_heading}{after}"


if __name__ == "__main__":
    main()
