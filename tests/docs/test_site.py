"""The pages link to what exists, and the site has all of them. `scripts/docs` builds it, strictly."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.docs import ROOT, links, pages

PAGES = pages()


def anchors(page: Path) -> set[str]:
    """What a page's headings are called in links: as GitHub makes them, which must be as the site's generator does."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", each) for each in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    on_github = [re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings]
    on_site = [re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", each).strip().lower()) for each in headings]
    assert on_github == on_site, f"{page.name}: write the heading so that both make the same anchor of it"
    assert len(set(on_github)) == len(on_github), f"{page.name}: two headings are the same"
    return set(on_github)


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {path}, which is not there"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {path}#{anchor}, which has no such heading"


def test_headings_make_the_same_anchors_everywhere() -> None:
    assert sum(len(anchors(page)) for page in PAGES) > 100


def test_links_in_code_are_none(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("[a](b.md)\n\n    [c](d.md)\n\n```\n[e](f.md)\n```\n[g](h.md#i) [j](https://k) [l](#m)\n")
    assert list(links(page)) == [("b.md", ""), ("h.md", "i"), ("", "m")]


def in_menu(entries: list[Any]) -> Iterator[str]:
    for entry in entries:
        (value,) = entry.values()
        yield from in_menu(value) if isinstance(value, list) else [value]


def test_the_menu_has_every_page() -> None:
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(in_menu(menu)) == sorted(["LICENSE.md", *(str(page.relative_to(ROOT)) for page in PAGES)])


def test_the_reference_names_what_there_is() -> None:
    """And all that the package's top offers."""
    sensorium = importlib.import_module("sensorium")
    names = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE)
    for name in names:
        home, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(home), attribute) or importlib.import_module(name), name
    public = {name.rpartition(".")[2] for name in names}
    assert set(sensorium.__all__) - {"__version__"} <= public


def test_files_that_the_tour_names_exist() -> None:
    """Those of the tour are under `sensorium/`, those of the last table begin at the root or stand beside another."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    sections = {each.partition("\n")[0]: each for each in re.split(r"^## ", text, flags=re.MULTILINE)}
    tour, table = sections["The tour"], sections["To change something"]
    in_tour = re.findall(r"`([\w/]+\.py)`", tour)
    in_table = re.findall(r"`((?:sensorium|tests|benchmarks|scripts)/[\w./]+)`", table)
    assert len(in_tour) > 30
    assert len(in_table) > 30
    paths = [*(f"sensorium/{name}" for name in in_tour), *in_table]
    assert [path for path in paths if not (ROOT / path).exists()] == []
