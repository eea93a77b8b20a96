"""Both ends of the supported ranges are those of pyproject.toml."""

from __future__ import annotations

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from scripts import verify_versions


@pytest.mark.parametrize("name", verify_versions.PACKAGES)
def test_the_ends_of_a_range(name: str) -> None:
    oldest, newest = (Requirement(verify_versions.requirement(name, end)) for end in ("oldest", "newest"))
    assert oldest.name == newest.name == name
    [pinned] = oldest.specifier
    first = pinned.version.removesuffix(".*")
    assert Version(first) in newest.specifier
    assert all(each.operator == "<" and Version(each.version) > Version(first) for each in newest.specifier)
    assert Version(f"{first}.9") in oldest.specifier
