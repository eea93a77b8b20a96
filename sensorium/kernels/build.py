"""Compiles the native CPU kernels, once for each machine, compiler and version of the sources.

Wheels contain compiled kernels (`variants.py`); this module is for source checkouts, and for machines without a wheel.

The shared library is kept in the user's cache folder under a name that is a digest of everything it depends
on. Any number of processes may ask for it at once: the first compiles, the others wait for it.

Without a C compiler on the machine, that of the Python package `ziglang` is used (Clang with the headers of a C
library).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sensorium.kernels.variants import cpu_features
from sensorium.logger import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

logger = get_logger(__name__)

SOURCE_FOLDER = Path(__file__).parent / "cpu"
COMPILERS = ("gcc", "cc", "clang")
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math")
LIBRARIES = ("-lm",)
THIS_MACHINE = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
TIMEOUT_S = 180.0
ZIG_CACHE = "ZIG_GLOBAL_CACHE_DIR"
"""Where `ziglang` caches its compiled C library, 50 MB. If it is not set, each build compiles it again."""


class BuildError(Exception):
    """The native kernels can't be compiled here; the message says why."""


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C compiler with GCC's command line."""

    program: Path
    options: tuple[str, ...] = ()
    """Arguments that come first."""
    machine_flag: str = THIS_MACHINE
    """The flag for the instruction set; this machine's by default."""

    @property
    def command(self) -> list[str]:
        """The start of its command line."""
        return [str(self.program), *self.options]


def build_library() -> Path:
    """The path of the compiled library, compiled now unless an earlier run did.

    Raises:
        BuildError: This machine has no usable compiler, or compiling failed.
    """
    if platform.system() != "Linux":
        raise BuildError(f"native kernels are built on Linux only, this is {platform.system()}")
    compiler, sources = _find_compiler(), sorted(SOURCE_FOLDER.glob("*.c"))
    path = _cache_folder() / f"kernels-{_digest(compiler)}.so"
    if not path.exists():
        with _lock(path.with_suffix(".lock")):
            if not path.exists():
                begin = time.perf_counter()
                compile_sources(sources, path)
                logger.info(
                    "Compiled the CPU kernels in %.1f s with %s.", time.perf_counter() - begin, compiler.program.name
                )
    return path


def compile_sources(
    sources: list[Path], path: Path, extra_flags: Sequence[str] = (), compiler: Compiler | None = None
) -> None:
    """Compile C files in parallel, and link them to a shared library, which is moved into place atomically.

    By default with this machine's compiler. `extra_flags` come last, so that they override the usual ones.

    Raises:
        BuildError: There is no compiler, or it failed.
    """
    compiler = compiler or _find_compiler()
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch, ThreadPoolExecutor(len(sources)) as pool:
        objects = [str(Path(scratch) / f"{source.stem}.o") for source in sources]
        run = partial(_run, environment={ZIG_CACHE: str(Path(scratch) / "zig"), **os.environ})
        compile_flags = [*compiler.command, *FLAGS, compiler.machine_flag, *extra_flags, "-c"]
        pairs = zip(sources, objects, strict=True)
        list(pool.map(run, [[*compile_flags, str(source), "-o", target] for source, target in pairs]))
        library = Path(scratch) / path.name
        run([*compiler.command, "-shared", "-pthread", *objects, *LIBRARIES, "-o", str(library)])
        library.replace(path)


def _find_compiler() -> Compiler:
    """The machine's compiler, or else that of the Python package `ziglang`."""
    for name in COMPILERS:
        found = shutil.which(name)
        if found is not None:
            return Compiler(Path(found).resolve())
    zig = zig_compiler()
    if zig is None:
        raise BuildError(
            f"no C compiler found (looked for {', '.join(COMPILERS)}; pip install 'sensorium[compiler]' brings one)"
        )
    return zig


def zig_compiler(*options: str, machine_flag: str = THIS_MACHINE) -> Compiler | None:
    """The compiler of the Python package `ziglang`, if it is installed."""
    package = importlib.util.find_spec("ziglang")
    if package is None or package.origin is None:
        return None
    # By default it adds checks for undefined behaviour to code that is not optimized.
    options = ("cc", "-fno-sanitize=undefined", *options)
    return Compiler(Path(package.origin).with_name("zig"), options, machine_flag)


def _digest(compiler: Compiler) -> str:
    stat = compiler.program.stat()
    parts = [*compiler.command, stat.st_size, stat.st_mtime_ns, *FLAGS, *LIBRARIES, platform.machine(), cpu_features()]
    digest = hashlib.sha256("\n".join(map(str, parts)).encode())
    for path in sorted(SOURCE_FOLDER.iterdir()):
        if path.suffix in (".c", ".h"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:32]


def _cache_folder() -> Path:
    """A folder that only this user can write to, because the process loads code from it."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(root) / "sensorium"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        stat = folder.stat()
        if stat.st_uid == os.geteuid() and not stat.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
        reason = "is not this user's alone"
    except (OSError, RuntimeError) as error:
        reason = f"can't be used ({error})"
    logger.info("The cache folder %s %s; the CPU kernels are compiled for this process only.", folder, reason)
    return Path(tempfile.mkdtemp(prefix="sensorium-"))


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes. The file is never deleted, since that would let two processes hold the
    lock."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(command: list[str], environment: Mapping[str, str]) -> None:
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=environment
        )
    except OSError as error:
        raise BuildError(f"{command[0]} can't be started: {error}") from error
    except subprocess.TimeoutExpired:
        raise BuildError(f"{command[0]} took more than {TIMEOUT_S:.0f} s") from None
    if result.returncode != 0:
        lines = result.stderr.splitlines()
        first_error = next((line for line in lines if "error" in line), result.stderr.strip()[:200])
        raise BuildError(f"{command[0]} failed: {first_error}")
