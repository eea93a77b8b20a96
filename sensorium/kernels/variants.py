"""The compiled CPU kernels of a wheel: one library for each instruction set, and the choice among them.

`scripts/release` compiles each variant into `PREBUILT_FOLDER`, which a source checkout doesn't have. This module only
chooses: `build.py` compiles, `native.py` loads.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

PREBUILT_FOLDER = Path(__file__).parent / "prebuilt"

_AVX2 = frozenset({"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"})
_AVX512 = _AVX2 | {"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"}
_AVX512_BF16 = _AVX512 | {"avx512_bf16", "avx512_vnni"}
_LONG_VECTORS = "-prefer_256_bit"
"""Without it, the compiler splits every vector of 512 bits in two."""


@dataclass(frozen=True, slots=True)
class Variant:
    """The kernels compiled for one instruction set."""

    machine: str
    """As `platform.machine` names it."""
    name: str
    cpu: str
    """The argument of `zig cc -mcpu=`."""
    features: frozenset[str] = frozenset()
    """The features that the processor must have, as `/proc/cpuinfo` names them. It lists only those that the system
    supports, too."""

    @property
    def file_name(self) -> str:
        """Of the library, in `PREBUILT_FOLDER`."""
        return f"kernels-{self.machine}-{self.name}.so"


VARIANTS = (
    Variant(
        "x86_64",
        "amx",
        f"x86_64_v4+avx512bf16+avx512vnni+amx_tile+amx_bf16+amx_int8{_LONG_VECTORS}",
        _AVX512_BF16 | {"amx_bf16", "amx_int8", "amx_tile"},
    ),
    Variant("x86_64", "avx512_bf16", f"x86_64_v4+avx512bf16+avx512vnni{_LONG_VECTORS}", _AVX512_BF16),
    Variant("x86_64", "avx512_vnni", f"x86_64_v4+avx512vnni{_LONG_VECTORS}", _AVX512 | {"avx512_vnni"}),
    Variant("x86_64", "avx512", f"x86_64_v4{_LONG_VECTORS}", _AVX512),
    Variant("x86_64", "avx2_vnni", "x86_64_v3+avxvnni", _AVX2 | {"avx_vnni"}),
    Variant("x86_64", "avx2", "x86_64_v3", _AVX2),
    Variant("x86_64", "baseline", "x86_64"),
    Variant("aarch64", "neon", "generic"),
)
"""For each architecture the fastest first; its last one runs on every such processor."""


def cpu_features() -> str:
    """The features of this machine's processor, by the system's names."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    features = (line.split(":", 1)[1] for line in lines if line.startswith(("flags", "Features")))
    return next(features, platform.processor())


def usable_variants(machine: str, features: str) -> list[Variant]:
    """The variants that such a machine can run, the fastest first."""
    present = set(features.split())
    return [each for each in VARIANTS if each.machine == machine and each.features <= present]


def prebuilt_libraries() -> dict[str, Path]:
    """The compiled libraries that came with the package and that this machine can run, by variant, the fastest first.

    Empty in a source checkout, and on machines without a wheel.
    """
    usable = usable_variants(platform.machine(), cpu_features())
    paths = {each.name: PREBUILT_FOLDER / each.file_name for each in usable}
    return {name: path for name, path in paths.items() if path.exists()}
