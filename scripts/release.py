"""Builds the files of a release, and tries them in an environment without a compiler.

    scripts/release [--out dist] [--skip-trial]

1. An sdist and one wheel for each platform are built from the last commit. Each wheel holds the CPU kernels compiled
   for every instruction set of its platform, by Clang (`ziglang`) against an old C library.
2. They are inspected: nothing of the package is missing, and the platform's tag is true.
3. This machine's wheel is installed into a new environment and answers a question about a picture by each of the
   libraries that the machine can run, without a compiler. The sdist is installed and tried too.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sensorium.kernels.build import SOURCE_FOLDER, ZIG_CACHE, compile_sources, zig_compiler
from sensorium.kernels.variants import PREBUILT_FOLDER, VARIANTS, Variant

ROOT = Path(__file__).parents[1]
GLIBC = (2, 28)  # that of the oldest systems that torch's wheels run on
PREBUILT = PREBUILT_FOLDER.relative_to(ROOT)

QUESTION = """\
import sys
from PIL import Image, ImageDraw
from sensorium import LLM, SamplingParams
from sensorium.kernels.native import native_library

picture = Image.new("RGB", (128, 128), "white")
ImageDraw.Draw(picture).ellipse((12, 12, 52, 52), fill="red")
ImageDraw.Draw(picture).rectangle((80, 80, 116, 116), fill="blue")
question = [{"type": "image", "image": picture}, {"type": "text", "text": "What is in the image?"}]
[answer] = LLM("demo").chat([{"role": "user", "content": question}], SamplingParams(temperature=0, max_tokens=64))
library = native_library()
print(library.path.name if library else "plain torch", answer.outputs[0].text, sep="|")
"""
ANSWER = "There are a red circle at the top left and a blue square at the bottom right."


@dataclass(frozen=True, slots=True)
class Platform:
    """The target of a wheel."""

    machine: str

    @property
    def tag(self) -> str:
        return f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{self.machine}"

    @property
    def target(self) -> str:
        """As Clang names it, with the C library to link against."""
        return f"{self.machine}-linux-gnu.{GLIBC[0]}.{GLIBC[1]}"

    @property
    def variants(self) -> list[Variant]:
        return [each for each in VARIANTS if each.machine == self.machine]


PLATFORMS = [Platform(machine) for machine in dict.fromkeys(each.machine for each in VARIANTS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where the files go (default: dist/)")
    parser.add_argument("--skip-trial", action="store_true", help="build and inspect only")
    options = parser.parse_args()
    if subprocess.check_output(["git", "status", "--porcelain"], cwd=ROOT, text=True):
        sys.exit("The working tree has changes that are not committed. Commit or stash them.")
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault(ZIG_CACHE, str(Path(scratch) / "zig"))  # what all variants share is compiled once
        sdist, wheels = build(Path(scratch), options.out)
        for wheel in wheels:
            inspect_wheel(wheel)
        inspect_sdist(sdist)
        if not options.skip_trial:
            own = [wheel for wheel in wheels if wheel.stem.endswith(platform.machine())]
            for number, package in enumerate([*own, sdist]):
                try_package(package, Path(scratch) / f"trial{number}")
    for path in (sdist, *wheels):
        say(f"{path} ({path.stat().st_size / 2**20:.1f} MiB)")


# ---- building -------------------------------------------------------------------------------------------------------


def build(scratch: Path, out: Path) -> tuple[Path, list[Path]]:
    """The sdist and the wheels, from an export of the last commit."""
    source = scratch / "source"
    source.mkdir()
    archive = subprocess.check_output(["git", "archive", last_commit()], cwd=ROOT)
    subprocess.run(["tar", "-x", "-C", str(source)], input=archive, check=True)
    sdist = build_one(source, out, "--sdist")
    wheels = []
    for each in PLATFORMS:
        compile_kernels(source, each)
        wheels.append(build_one(source, out, "--wheel", f"--config-setting=--build-option=--plat-name={each.tag}"))
    return sdist, wheels


def compile_kernels(source: Path, target: Platform) -> None:
    """Compile the platform's kernels into the source tree, replacing those of another platform."""
    folder = source / PREBUILT
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(source / "build", ignore_errors=True)
    folder.mkdir()
    c_files = sorted((source / SOURCE_FOLDER.relative_to(ROOT)).glob("*.c"))
    for variant in target.variants:
        say(f"compiling {variant.file_name}")
        compiler = zig_compiler("-target", target.target, "-s", machine_flag=f"-mcpu={variant.cpu}")
        assert compiler is not None, "the extra `release` brings it"
        compile_sources(c_files, folder / variant.file_name, compiler=compiler)


def build_one(source: Path, out: Path, *arguments: str) -> Path:
    """Run one build and return its file."""
    say(f"building {' '.join(arguments)}")
    epoch = subprocess.check_output(["git", "log", "-1", "--format=%ct", last_commit()], cwd=ROOT, text=True).strip()
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        run([sys.executable, "-m", "build", *arguments, "--outdir", folder, str(source)], SOURCE_DATE_EPOCH=epoch)
        [made] = Path(folder).iterdir()
        return Path(shutil.move(made, out / made.name))


# ---- inspecting -----------------------------------------------------------------------------------------------------


def inspect_wheel(path: Path) -> None:
    """Check that a wheel holds the whole package and its platform's kernels, and runs where its tag says."""
    target = next(each for each in PLATFORMS if path.stem.endswith(each.tag))
    wanted = {*tracked("sensorium"), *(str(PREBUILT / each.file_name) for each in target.variants)}
    with zipfile.ZipFile(path) as wheel:
        expect_same(path, wanted, (name for name in wheel.namelist() if ".dist-info/" not in name))
    report = subprocess.check_output([sys.executable, "-m", "auditwheel", "show", str(path)], text=True)
    found = re.search(rf"manylinux_(\d+)_(\d+)_{target.machine}", report)
    if found is None or (int(found[1]), int(found[2])) > GLIBC:
        sys.exit(f"{path.name} does not run where its tag says:\n{report}")
    run([sys.executable, "-m", "twine", "check", "--strict", str(path)])


def inspect_sdist(path: Path) -> None:
    """Check that the sdist holds what a wheel is built from, and the licence."""
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {*tracked("sensorium"), "LICENSE", "README.md", "pyproject.toml", "setup.py"}
    expect_same(path, wanted, names & wanted)
    run([sys.executable, "-m", "twine", "check", "--strict", str(path)])


def tracked(folder: str) -> list[str]:
    """The files of a folder that are under version control."""
    command = ["git", "ls-tree", "-r", "--name-only", last_commit(), folder]
    return subprocess.check_output(command, cwd=ROOT, text=True).splitlines()


@cache
def last_commit() -> str:
    """The commit that is released: the last one when this began."""
    return subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()


def expect_same(path: Path, wanted: Iterable[str], got: Iterable[str]) -> None:
    missing, extra = set(wanted) - (present := set(got)), present - set(wanted)
    if missing or extra:
        sys.exit(f"{path.name}: missing {sorted(missing)}, unexpected {sorted(extra)}")


# ---- trying ---------------------------------------------------------------------------------------------------------


def try_package(package: Path, folder: Path) -> None:
    """Install a package into an environment of its own, without a compiler, and ask it about a picture."""
    say(f"trying {package.name}")
    run([sys.executable, "-m", "venv", str(folder / "venv")])
    python = folder / "venv" / "bin" / "python"
    constraints = ROOT / "scripts" / "constraints.txt"
    run([str(python), "-I", "-m", "pip", "install", "--quiet", "--constraint", str(constraints), str(package)])
    environment = {"PATH": str(python.parent), "HOME": str(folder), "LANG": "C.UTF-8"}
    names = "from sensorium.kernels.variants import prebuilt_libraries as found; print(*found())"
    variants = ask([str(python), "-c", names], folder, environment).split()
    if package.suffix == ".whl" and not variants:
        sys.exit(f"{package.name} holds no kernels that this machine can run")
    for variant in variants or ["0"]:
        line = ask([str(python), "-c", QUESTION], folder, {**environment, "SENSORIUM_NATIVE": variant})
        library, _, answer = line.strip().rpartition("\n")[2].partition("|")
        say(f"  {variant}: {library}: {answer}")
        if answer != ANSWER or library != ("plain torch" if variant == "0" else library_name(variant)):
            sys.exit(f"expected: {ANSWER}")
    ask([str(python.with_name("sensorium")), "--version"], folder, environment)


def library_name(variant: str) -> str:
    return next(each.file_name for each in VARIANTS if (each.machine, each.name) == (platform.machine(), variant))


def ask(command: list[str], folder: Path, environment: Mapping[str, str]) -> str:
    return subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def run(command: list[str], **variables: str) -> None:
    subprocess.run(command, check=True, env={**os.environ, **variables}, stdout=subprocess.DEVNULL)


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
