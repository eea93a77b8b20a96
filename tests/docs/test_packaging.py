"""What a package index, and a company's lawyer, look for in the package."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import sensorium

ROOT = Path(__file__).parents[2]


def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def test_the_licence_comes_with_the_package() -> None:
    """It was declared, and its text was nowhere."""
    assert project()["license"] == "Apache-2.0"
    assert project()["license-files"] == ["LICENSE"]
    text = (ROOT / "LICENSE").read_text()
    assert text.split()[:6] == ["Apache", "License", "Version", "2.0,", "January", "2004"]
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_version_stands_in_one_place() -> None:
    assert "version" not in project()
    assert project()["dynamic"] == ["version"]
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {sensorium.__version__}\n" in changes, "the changes begin with this version"
    assert changes.index(f"## {sensorium.__version__}") == changes.index("\n## ") + 1


def test_links_between_pages_lead_somewhere() -> None:
    """Pages at the root, in docs/ and in folders of their own, the only ones that link to files."""
    folders = [ROOT / name for name in ("docs", "examples", "training")]
    pages = [page for folder in (ROOT, *folders) for page in folder.glob("*.md")]
    broken = [
        (str(page.relative_to(ROOT)), link)
        for page in pages
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
        if "://" not in link and not (page.parent / link).exists()
    ]
    assert broken == []


def test_files_that_contributing_names_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`((?:sensorium|tests|benchmarks|scripts)/[\w./]+)`", text)
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []
