"""The documentation's Python blocks run, in order, as one program per page.

A block that stands word for word in a script of `examples/` runs there instead.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest

from sensorium.multimodal import MULTIMODAL_REGISTRY

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = sorted(
    str(page.relative_to(ROOT))
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
    if BLOCK.search(page.read_text())
)
SCRIPTS = [path.read_text() for path in (ROOT / "examples").glob("*.py")]


def test_there_are_pages_with_examples() -> None:
    assert {"README.md", "docs/adding_a_multimodal_model.md"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A page may add a modality, which other tests must not see.
    monkeypatch.setattr(MULTIMODAL_REGISTRY, "_plugins", dict(MULTIMODAL_REGISTRY._plugins))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    text = (ROOT / page).read_text()
    namespace: dict[str, object] = {"__name__": f"docs.{Path(page).stem}"}  # and no name that a page lacks
    for match in BLOCK.finditer(text):
        if any(match.group(1) in script for script in SCRIPTS):
            continue
        line = text[: match.start(1)].count("\n")
        # Blank lines in front, so that a traceback names the line of the page.
        exec(compile("\n" * line + match.group(1), str(ROOT / page), "exec"), namespace)


def test_the_readme_starts_with_an_answer_and_says_which(capsys: pytest.CaptureFixture[str]) -> None:
    first = BLOCK.search((ROOT / "README.md").read_text())
    assert first is not None
    assert 'LLM("demo")' in first[1]
    exec(compile(first[1], "README.md", "exec"), {"__name__": "docs.first"})
    [promised] = re.findall(r"^print\(.*\)  # (.*)$", first[1], re.MULTILINE)
    assert capsys.readouterr().out.strip() == promised
