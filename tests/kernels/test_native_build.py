"""Compiling and caching the native library, and what happens where that can't be done."""

from __future__ import annotations

import logging
import os
import platform
import shlex
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sensorium import kernels
from sensorium.kernels import build, native
from sensorium.kernels.activation import gelu_reference, silu_and_mul_reference
from sensorium.kernels.norm import rms_norm_reference
from tests.helpers.attention import LENS, RULES, SPANS, paged_step, varlen_step
from tests.helpers.waiting import HANG_S


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """No library loaded, an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SENSORIUM_NATIVE", raising=False)
    native._load.cache_clear()
    yield tmp_path / "sensorium"
    monkeypatch.undo()
    native._load.cache_clear()


@pytest.fixture
def tiny_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A source folder that compiles at once."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "one.c").write_text("int one(void) { return 1; }\n")
    monkeypatch.setattr(build, "SOURCE_FOLDER", folder)
    return folder


def _fake_compiler(folder: Path, script: str) -> Path:
    path = folder / "gcc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def _works(rows: int = 3) -> None:
    """The public functions give right answers, whatever runs them."""
    x, weight = torch.randn(rows, 24), torch.randn(16, 24)
    torch.testing.assert_close(kernels.packed_linear(x, kernels.pack(weight)), x @ weight.T)
    torch.testing.assert_close(kernels.quick_gelu(x), x * torch.sigmoid(1.702 * x))


@pytest.mark.usefixtures("native_kernels")
def test_second_build_reuses_the_first(fresh: Path, tiny_source: Path) -> None:
    path = build.build_library()
    assert path.parent == fresh
    assert stat.S_IMODE(fresh.stat().st_mode) == 0o700
    before = path.stat()
    assert build.build_library() == path
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert sorted(p.suffix for p in fresh.glob("kernels-*")) == [".lock", ".so"]


@pytest.mark.usefixtures("native_kernels")
@pytest.mark.parametrize("change", ["source", "header", "compiler", "cpu"])
def test_name_changes_with_all_that_the_library_depends_on(
    change: str, fresh: Path, tiny_source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = build._find_compiler()
    before = build._digest(compiler)
    if change == "source":
        (tiny_source / "one.c").write_text("int one(void) { return 2; }\n")
    elif change == "header":
        (tiny_source / "new.h").write_text("")
    elif change == "compiler":
        compiler = build.Compiler(_fake_compiler(tiny_source, "exit 1"))
    else:
        monkeypatch.setattr(build, "cpu_features", lambda: "another")
    assert build._digest(compiler) != before


@pytest.mark.usefixtures("native_kernels")
def test_processes_that_start_together_compile_once(fresh: Path, tmp_path: Path) -> None:
    """Each builds a slow source; a compiler that counts its runs tells how many did."""
    log = tmp_path / "runs"
    folder = tmp_path / "bin"
    folder.mkdir()
    _fake_compiler(folder, f'echo run >> {log}\nsleep 0.2\nexec {shlex.join(build._find_compiler().command)} "$@"')
    source = tmp_path / "source"
    source.mkdir()
    (source / "one.c").write_text("int one(void) { return 1; }\n")
    code = (
        "from pathlib import Path; from sensorium.kernels import build; "
        f"build.SOURCE_FOLDER = Path({str(source)!r}); print(build.build_library())"
    )
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(sys.path)}
    jobs = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    paths = {job.communicate(timeout=HANG_S)[0].strip() for job in jobs}
    assert all(job.returncode == 0 for job in jobs)
    assert len(paths) == 1
    assert Path(paths.pop()).exists()
    assert log.read_text().split() == ["run", "run"]  # compile and link


@pytest.mark.parametrize("case", ["none", "broken", "missing"])
def test_without_a_usable_compiler_torch_takes_over(
    case: str,
    fresh: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One log line with the reason, right answers, and no half-made library."""
    folder = tmp_path / "bin"
    folder.mkdir()
    if case == "broken":
        _fake_compiler(folder, "echo 'linear.c:1: error: out of luck' >&2; exit 1")
    elif case == "missing":
        _fake_compiler(folder, "").write_text("#!/nowhere/interpreter\n")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setitem(sys.modules, "ziglang", None)  # as if it were not installed
    expected = {"none": "no C compiler", "broken": "out of luck", "missing": "can't be started"}[case]
    with caplog.at_level(logging.INFO, logger="sensorium"):
        _works()
        _works()
    assert kernels.native_refusal() is not None
    assert expected in str(kernels.native_refusal())
    assert [r.levelname for r in caplog.records if expected in r.getMessage()] == ["WARNING"]
    assert not list(fresh.glob("*.so"))


def test_switched_off_by_the_environment(without_native: None) -> None:
    assert kernels.native_refusal() == "SENSORIUM_NATIVE=0"
    _works()


@pytest.mark.usefixtures("native_kernels")
def test_a_cache_folder_of_others_is_not_trusted(
    fresh: Path, tiny_source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever can write there could have put a library under the expected name."""
    fresh.mkdir()
    fresh.chmod(0o777)
    planted = fresh / f"kernels-{build._digest(build._find_compiler())}.so"
    planted.write_text("not a library")
    path = build.build_library()
    assert path.parent != fresh
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.usefixtures("native_kernels")
def test_an_unusable_home_is_no_obstacle(fresh: Path, tiny_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh.parent.joinpath("file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh.parent / "file"))
    assert build.build_library().exists()


VARIANTS = {
    # The vectors and the layout of AVX512-BF16, put together from shorter vectors and plain arithmetic.
    "wide": ["-O0", "-DVL=16", "-DBF16_PAIRS=1", "-Wno-psabi"],
    # The same with matrix tiles, emulated.
    "tiles": ["-O1", "-DVL=16", "-DBF16_PAIRS=1", "-DTILES=2", "-Wno-psabi"],
    # No vector extension beyond what every machine of this kind has.
    "plain": ["-O0", "-Wno-psabi", *(["-mno-sse3"] if platform.machine() == "x86_64" else ["-mcpu=generic"])],
}


@pytest.fixture(params=VARIANTS)
def other_machine(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels as they are compiled for another kind of machine."""
    path = tmp_path / "kernels.so"
    build.compile_sources(sorted(build.SOURCE_FOLDER.glob("*.c")), path, VARIANTS[request.param])
    library = native.NativeLibrary(path)
    monkeypatch.setattr(native, "_load", lambda: (library, None))


@pytest.mark.usefixtures("native_kernels", "other_machine")
def test_other_machines_compute_the_same() -> None:
    """What this machine's instructions don't reach: other vector lengths, other layouts of packed weights."""
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        for n, k in ((1, 1), (33, 31), (70, 600)):
            weight, bias, x = (torch.randn(shape).to(dtype) for shape in ((n, k), (n,), (27, k)))
            packed = kernels.pack(weight)
            whole = kernels.packed_linear(x, packed, bias)
            want = (x.double() @ weight.double().T + bias.double()).to(dtype)
            torch.testing.assert_close(whole, want, atol=tolerance * k**0.5, rtol=tolerance)
            for rows in (1, 2, 3, 5, 7, 12, 13):
                assert torch.equal(kernels.packed_linear(x[:rows], packed, bias), whole[:rows])
        for head_size, value_size in ((16, 16), (20, 20), (72, 72), (48, 20), (20, 72)):
            sizes: dict[str, Any] = {"heads": (6, 2), "head_size": head_size, "value_size": value_size, "dtype": dtype}
            for rules in (RULES[2], RULES[6]):
                step = paged_step(LENS[3], rules, spans=SPANS[3], has_sinks=True, **sizes)
                got = kernels.paged_attention(*step.arguments)
                torch.testing.assert_close(got, step.expected, atol=tolerance, rtol=tolerance)
                flat = varlen_step([70, 1, 19], rules, has_sinks=True, **sizes)
                got = kernels.varlen_attention(*flat.arguments, **flat.options)
                torch.testing.assert_close(got, flat.expected, atol=tolerance, rtol=tolerance)
        x, weight = torch.randn(5, 46).to(dtype), torch.randn(46).to(dtype)
        for got, expected in (
            (kernels.rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6)),
            (kernels.gelu(x), gelu_reference(x)),
            (kernels.gelu(x, "tanh"), gelu_reference(x, "tanh")),
            (kernels.silu_and_mul(x), silu_and_mul_reference(x)),
        ):
            torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
