"""Builds the documentation as a site, from the pages of the repository.

    scripts/docs        # into build/site

The pages are copied together with the files that they link to, and keep their paths, so that a link that works in the
repository works on the site too. The Python reference is made from docstrings, without importing the code. A broken
link, or a page that isn't in a menu, fails the build.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "build" / "pages"
FOLDERS = ("", "docs", "examples", "training")
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    shutil.rmtree(PAGES, ignore_errors=True)
    for path in (*pages(), *linked_files()):
        copy = PAGES / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    (PAGES / "LICENSE.md").write_text(f"# License\n\n```text\n{licence}```\n", encoding="utf-8")
    subprocess.run([sys.executable, "-m", "zensical", "build", "--strict", "--clean"], cwd=ROOT, check=True)


def pages() -> list[Path]:
    """The pages that are written by hand or by `make_docs.py`, as they lie in the repository."""
    return [page for folder in FOLDERS for page in sorted((ROOT / folder).glob("*.md"))]


def links(page: Path) -> Iterator[tuple[str, str]]:
    """The links of a page to others of the repository: path and anchor, either may be empty. Code holds none."""
    text = re.sub(r"^```.*?^```|^    .*?$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for path, anchor in LINK.findall(text):
        if "://" not in path:
            yield path, anchor


def linked_files() -> list[Path]:
    """Files other than pages that pages show or link to."""
    found = {(page.parent / path).resolve() for page in pages() for path, _ in links(page)}
    return sorted(path for path in found if path.is_file() and path.suffix != ".md")


if __name__ == "__main__":
    main()
