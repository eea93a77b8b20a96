"""What a package index, and a company's lawyer, look for in the package."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import sensorium
from sensorium.kernels.variants import PREBUILT_FOLDER

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
    titles = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    released = titles[titles[0] == "Unreleased" :]
    assert released[0] == sensorium.__version__, "the changes begin with this version, or with what comes after it"


def test_every_file_of_the_package_gets_into_a_wheel() -> None:
    """`scripts/release` compares a built wheel with the files under version control; this is the fast part of it."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = tool["package-data"]["sensorium"]
    made = {".pyc", ".so"}  # what importing and compiling leave there
    files = [each for each in (ROOT / "sensorium").rglob("*") if each.is_file() and each.suffix not in made]
    tracked = [each.relative_to(ROOT).as_posix() for each in files]
    assert "sensorium/py.typed" in tracked
    left_out = [
        name
        for name in tracked
        if not name.endswith(".py") and not any(PurePath(name).match(f"sensorium/{pattern}") for pattern in patterns)
    ]
    assert left_out == []
    folders = {Path(name).parent for name in tracked if name.endswith(".py")}
    assert [str(each) for each in folders if str(each / "__init__.py") not in tracked] == [], "packages are found by it"
    assert str(PREBUILT_FOLDER / "x.so").endswith("sensorium/kernels/prebuilt/x.so")
    assert "kernels/prebuilt/*.so" in patterns


def test_a_wheel_is_for_its_platform_only_with_compiled_kernels(tmp_path: Path) -> None:
    """Compiled kernels are called through ctypes: the wheel depends on a platform, and on no version of Python."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    code = (
        "from setuptools import Distribution\n"
        "import setuptools\n"
        "found = {}\n"
        "setuptools.setup = lambda **options: found.update(options)\n"
        "exec(compile(open('setup.py').read(), 'setup.py', 'exec'), {'__file__': 'setup.py', '__name__': 'setup'})\n"
        "wheel = found['cmdclass']['bdist_wheel'](found['distclass']({'name': 'x'}))\n"
        "wheel.plat_name = 'manylinux_2_28_x86_64'\n"
        "wheel.ensure_finalized()\n"
        "print('-'.join(wheel.get_tag()), wheel.root_is_pure)\n"
    )
    ask = partial(subprocess.check_output, [sys.executable, "-c", code], cwd=tmp_path, text=True)
    assert ask().split()[1] == "True"
    library = tmp_path / "sensorium" / "kernels" / "prebuilt" / "kernels.so"
    library.parent.mkdir(parents=True)
    library.touch()
    assert ask().split() == ["py3-none-manylinux_2_28_x86_64", "False"]
