"""`sensorium env`: versions and the machine, for reports of errors."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import sensorium

_PACKAGES = (
    *("torch", "transformers", "tokenizers", "safetensors", "numpy", "pillow", "av", "msgspec", "httpx"),
    *("starlette", "uvicorn", "pydantic", "llguidance", "triton", "matplotlib"),
)
_CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")


def fill(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Print what there is."""
    found = collect()
    if parsed.json:
        print(json.dumps(found))
    else:
        width = max(map(len, found))
        print("\n".join(f"{name:{width}}  {_shown(value)}" for name, value in found.items()))
    return 0


def collect() -> dict[str, Any]:
    """The facts by name. None of them identifies the user."""
    return {
        "sensorium": sensorium.__version__,
        "python": sys.version.split()[0],
        "system": platform.platform(),
        **{name: version for name in _PACKAGES if (version := _version(name)) is not None},
        **_cpu(),
        **_torch(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    lines = _lines("/proc/cpuinfo")
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags", "").split()
    memory = {name: value for name, _, value in (line.partition(":") for line in _lines("/proc/meminfo"))}
    size_kib = memory.get("MemTotal", "0").split()[0]
    return {
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "cpu features": [flag for flag in _CPU_FLAGS if flag in flags],
        "cores": f"{_num_usable_cores()} usable of {os.cpu_count()}",
        "memory": f"{int(size_kib) / 2**20:.1f} GiB",
    }


def _num_usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return []


def _torch() -> dict[str, Any]:
    import torch

    from sensorium.kernels.native import native_library, native_refusal

    library = native_library()
    has_cuda = torch.cuda.is_available()
    return {
        "native CPU kernels": f"no: {native_refusal()}" if library is None else f"yes: {library.path.stem}",
        "torch threads": torch.get_num_threads(),
        "CUDA": torch.version.cuda or "not in this build of torch",
        "GPUs": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if has_cuda else [],
    }


def _shown(value: Any) -> str:
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)
