"""Which of the compiled libraries that came with the package a machine uses."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sensorium import kernels
from sensorium.errors import ConfigError
from sensorium.kernels import build, native, variants
from sensorium.kernels.variants import VARIANTS, usable_variants

HASWELL = "fpu sse2 ssse3 fma movbe f16c avx avx2 bmi1 bmi2"
ALDER_LAKE = f"{HASWELL} avx_vnni gfni"
SKYLAKE_X = f"{HASWELL} avx512f avx512dq avx512cd avx512bw avx512vl"
ICE_LAKE = f"{SKYLAKE_X} avx512_vnni avx512vbmi"
ZEN_4 = f"{ICE_LAKE} avx512_bf16"
SAPPHIRE_RAPIDS = f"{ZEN_4} avx_vnni amx_bf16 amx_tile amx_int8"


@pytest.mark.parametrize(
    ("machine", "features", "names"),
    [
        ("x86_64", SAPPHIRE_RAPIDS, "amx avx512_bf16 avx512_vnni avx512 avx2_vnni avx2 baseline"),
        ("x86_64", ZEN_4, "avx512_bf16 avx512_vnni avx512 avx2 baseline"),
        ("x86_64", ICE_LAKE, "avx512_vnni avx512 avx2 baseline"),
        ("x86_64", SKYLAKE_X, "avx512 avx2 baseline"),
        ("x86_64", ALDER_LAKE, "avx2_vnni avx2 baseline"),
        ("x86_64", HASWELL, "avx2 baseline"),
        ("x86_64", "fpu sse2", "baseline"),
        ("x86_64", "", "baseline"),
        ("aarch64", "fp asimd", "neon"),
        ("aarch64", "", "neon"),
        ("riscv64", "imafdc", ""),
    ],
)
def test_a_machine_runs_what_its_processor_has(machine: str, features: str, names: str) -> None:
    """The fastest first. A processor that hides one feature of a set does without the set."""
    assert [each.name for each in usable_variants(machine, features)] == names.split()
    for one in features.split():
        fewer = usable_variants(machine, features.replace(one, ""))
        assert all(one not in each.features for each in fewer)


def test_names_are_unique_and_each_machine_has_one_for_all() -> None:
    assert len({each.file_name for each in VARIANTS}) == len(VARIANTS)
    for machine in {each.machine for each in VARIANTS}:
        assert [each for each in VARIANTS if each.machine == machine][-1].features == frozenset()


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, native_kernels: None) -> Iterator[Path]:
    """As installed from a wheel on a machine without a compiler: the folder of compiled libraries, empty at first."""
    library = native.native_library()
    assert library is not None
    shutil.copy(library.path, tmp_path / "library.so")
    monkeypatch.setattr(variants, "PREBUILT_FOLDER", tmp_path)
    monkeypatch.setattr(build, "_find_compiler", no_compiler)
    monkeypatch.delenv("SENSORIUM_NATIVE", raising=False)
    native._load.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    native._load.cache_clear()


def no_compiler() -> build.Compiler:
    raise build.BuildError("no C compiler found")


def put(wheel: Path, *names: str) -> list[str]:
    """Give the wheel compiled libraries of these names; returns the files' names."""
    usable = [each for each in own_variants() if each.name in names]
    for each in usable:
        shutil.copy(wheel / "library.so", wheel / each.file_name)
    return [each.file_name for each in usable]


def own_variants() -> list[variants.Variant]:
    return usable_variants(platform.machine(), variants.cpu_features())


def test_the_fastest_library_is_used_without_a_compiler(wheel: Path) -> None:
    names = put(wheel, *(each.name for each in own_variants()))
    library = native.native_library()
    assert library is not None
    assert library.path == wheel / names[0]
    x, weight = torch.randn(3, 24), torch.randn(16, 24)
    torch.testing.assert_close(kernels.packed_linear(x, kernels.pack(weight)), x @ weight.T)


def test_a_library_that_the_machine_can_not_run_is_left_alone(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(wheel, *(each.name for each in own_variants()))
    slowest = own_variants()[-1]
    monkeypatch.setattr(variants, "cpu_features", lambda: "")
    library = native.native_library()
    assert library is not None
    assert library.path.name == slowest.file_name


def test_the_environment_names_a_library(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = put(wheel, *(each.name for each in own_variants()))
    monkeypatch.setenv("SENSORIUM_NATIVE", own_variants()[-1].name)
    library = native.native_library()
    assert library is not None
    assert library.path.name == names[-1]


@pytest.mark.parametrize("value", ["avx1024", "", "yes", "library"])
def test_a_library_that_there_is_not_is_an_error(wheel: Path, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was taken for 1 once, as anything but 0 was."""
    name = own_variants()[-1].name
    put(wheel, name)
    monkeypatch.setenv("SENSORIUM_NATIVE", value)
    with pytest.raises(ConfigError, match=rf"SENSORIUM_NATIVE: got '{value}', expected 0, 1, {name}\. Unset it"):
        native.native_library()


def test_without_a_library_or_a_compiler_torch_takes_over(wheel: Path) -> None:
    assert native.native_library() is None
    assert native.native_refusal() == "no C compiler found"


MACROS = {
    "__AVX2__": "avx2",
    "__FMA__": "fma",
    "__F16C__": "f16c",
    "__BMI2__": "bmi2",
    "__AVX512F__": "avx512f",
    "__AVX512BW__": "avx512bw",
    "__AVX512DQ__": "avx512dq",
    "__AVX512VL__": "avx512vl",
    "__AVX512CD__": "avx512cd",
    "__AVX512VNNI__": "avx512_vnni",
    "__AVX512BF16__": "avx512_bf16",
    "__AVX512VBMI__": "avx512vbmi",
    "__AVX512FP16__": "avx512_fp16",
    "__AVXVNNI__": "avx_vnni",
    "__AMX_TILE__": "amx_tile",
    "__AMX_BF16__": "amx_bf16",
    "__AMX_INT8__": "amx_int8",
    "__GFNI__": "gfni",
}


@pytest.mark.parametrize("variant", VARIANTS, ids=[each.file_name for each in VARIANTS])
def test_a_library_uses_what_it_asks_for_and_no_more(variant: variants.Variant) -> None:
    """By the compiler's own account: an instruction that a processor lacks ends the process."""
    zig = build.zig_compiler("-target", f"{variant.machine}-linux-gnu", machine_flag=f"-mcpu={variant.cpu}")
    if zig is None:
        pytest.skip("ziglang is not installed")
    command = [*zig.command, zig.machine_flag, "-E", "-dM", "-x", "c", "/dev/null"]
    defined = {line.split()[1] for line in subprocess.check_output(command, text=True).splitlines()}
    assert {MACROS[each] for each in defined & MACROS.keys()} == variant.features & set(MACROS.values())
