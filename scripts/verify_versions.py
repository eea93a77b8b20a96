"""Runs the tests that depend on versions of torch and transformers with the oldest and the newest that are supported.

    python scripts/verify_versions.py oldest|newest [--python PYTHON] [--venv FOLDER] [--timeout SECONDS] [TESTS...]

Makes a virtual environment for each end of the ranges in pyproject.toml (some gigabytes where the package index has
only builds for GPUs), and runs each folder of tests, or TESTS, in a process of its own. Prints what failed; the exit
status is 1 then.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers")
TESTS = ("tests/contract", "tests/model_executor", "tests/multimodal", "tests/worker")
NOT_NEEDED = ("tokenizers", "mypy", "ruff", "auditwheel", "build", "twine", "mkdocstrings-python", "zensical")
"""Of the constraints: what comes with transformers, and what no test of these runs."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("end", choices=["oldest", "newest"])
    parser.add_argument("--python", default=sys.executable, help="of the environment [this one]")
    parser.add_argument("--venv", type=Path, help="the environment's folder [.venv-oldest or .venv-newest]")
    parser.add_argument("--timeout", type=float, help="most seconds of one folder of tests")
    parser.add_argument("tests", nargs="*", default=list(TESTS))
    parsed = parser.parse_args()
    python = environment(parsed.venv or ROOT / f".venv-{parsed.end}", parsed.python, parsed.end)
    shown = "import sys, torch, transformers as t; print(sys.version.split()[0], torch.__version__, t.__version__)"
    subprocess.run([python, "-c", shown], check=True)
    failed = [tests for tests in parsed.tests if not passes(python, tests, parsed.timeout)]
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0


def environment(folder: Path, python: str, end: str) -> str:
    """The interpreter of an environment with these versions, which is made unless it is there."""
    inside = str(folder / "bin" / "python")
    if Path(inside).exists():
        return inside
    wanted = [requirement(name, end) for name in PACKAGES]
    constraints = (ROOT / "scripts" / "constraints.txt").read_text().splitlines()
    others = [each for each in constraints if re.split("[=<>]", each)[0] not in (*PACKAGES, *NOT_NEEDED)]
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    install = [inside, "-m", "pip", "install", "--quiet"]
    # Processors of pictures of old versions want torchvision.
    subprocess.run([*install, *wanted, *(["torchvision"] if end == "oldest" else [])], check=True)
    subprocess.run([*install, *wanted, *(each for each in others if not each.startswith("#"))], check=True)
    return inside


def requirement(name: str, end: str) -> str:
    """One end of a package's range: `torch>=2.11,<2.16` is `torch==2.11.*` or `torch<2.16`."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        ranges = tomllib.load(file)["project"]["dependencies"]
    low, high = next(each for each in ranges if each.startswith(f"{name}>=")).removeprefix(f"{name}>=").split(",")
    return f"{name}=={low}.*" if end == "oldest" else f"{name}{high}"


def passes(python: str, tests: str, timeout_s: float | None) -> bool:
    """Whether the tests of one folder or file pass, within the time that they have."""
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", tests]
    try:
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(pytest, cwd=ROOT, env=environ, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        print(f"{tests}: not done in {timeout_s} s")
        return False
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
