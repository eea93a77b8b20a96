"""The documentation's Python blocks run, in order, as one program per page."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest

from sensorium.multimodal import MULTIMODAL_REGISTRY

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = sorted(page.name for page in DOCS.glob("*.md") if BLOCK.search(page.read_text()))


def test_there_is_a_page_with_examples() -> None:
    assert "adding_a_multimodal_model.md" in PAGES


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A page may add a modality, which other tests must not see.
    monkeypatch.setattr(MULTIMODAL_REGISTRY, "_plugins", dict(MULTIMODAL_REGISTRY._plugins))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    text = (DOCS / page).read_text()
    namespace: dict[str, object] = {"__name__": f"docs.{page.removesuffix('.md')}"}  # and no name that a page lacks
    for match in BLOCK.finditer(text):
        line = text[: match.start(1)].count("\n")
        # Blank lines in front, so that a traceback names the line of the page.
        exec(compile("\n" * line + match.group(1), str(DOCS / page), "exec"), namespace)
