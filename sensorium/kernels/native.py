"""The native CPU kernels as Python functions, or the reason why there are none.

A call passes one C struct, packed from numbers: with `ctypes` that takes half the time of as many arguments.

The library is the fastest of the package's that this machine can run; a source checkout compiles one instead. For
debugging, the environment variable `SENSORIUM_NATIVE` overrides the choice: 0 for the plain-torch twins, or a variant's
name.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from struct import Struct
from typing import Protocol

import torch

from sensorium.errors import ConfigError
from sensorium.kernels.build import BuildError, build_library
from sensorium.kernels.variants import prebuilt_libraries
from sensorium.logger import get_logger

logger = get_logger(__name__)

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The storage types, as `simd.h` numbers them."""


class NativeFunction:
    """One exported function `int f(const struct *)`; `fields` describes the struct as a format of Python's `struct`.

    Raises:
        BuildError: The struct's size differs in C.
    """

    __slots__ = ("_function", "_pack")

    def __init__(self, library: ctypes.CDLL, name: str, fields: str) -> None:
        self._function = getattr(library, name)
        self._function.argtypes = [ctypes.c_char_p]
        self._function.restype = ctypes.c_int
        struct = Struct(f"{fields}0P")  # padded at its end as C does
        size = ctypes.c_long.in_dll(library, f"{name}_args_bytes").value
        if struct.size != size:
            raise BuildError(f"{name} takes a struct of {size} bytes, not of {struct.size}")
        self._pack = struct.pack

    def __call__(self, *values: float) -> None:
        """Run with the values of the struct's fields in order; addresses are ints, 0 for none."""
        if self._function(self._pack(*values)):
            raise MemoryError("a CPU kernel could not allocate its working memory")


class QuantizedFunctions(Protocol):
    """What linear layers in int8 need."""

    quantize: NativeFunction
    quantized_bytes: Callable[[int, int], int]
    quantized_linear: NativeFunction


def add_quantized_functions(target: QuantizedFunctions, library: ctypes.CDLL) -> None:
    """Set the attributes of `QuantizedFunctions`."""
    target.quantize = NativeFunction(library, "sensorium_quantize", "@2P3l2i")
    target.quantized_linear = NativeFunction(library, "sensorium_quantized_linear", "@4P4l2i")
    quantized_bytes = library.sensorium_quantized_bytes
    quantized_bytes.argtypes = [ctypes.c_long, ctypes.c_long]
    quantized_bytes.restype = ctypes.c_long
    target.quantized_bytes = quantized_bytes


class NativeLibrary:
    """The functions of a compiled library. The formats mirror the `*_args` structs of the C files."""

    __slots__ = (
        "_use_tiles",
        "activation",
        "argmax",
        "attention",
        "linear",
        "pack",
        "packed_bytes",
        "path",
        "quantize",
        "quantized_bytes",
        "quantized_linear",
        "rms_norm",
        "rotary",
        "write_kv",
    )
    quantize: NativeFunction
    quantized_bytes: Callable[[int, int], int]
    quantized_linear: NativeFunction

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self.path = path
        self.rms_norm = NativeFunction(library, "sensorium_rms_norm", "@5P4lf3i")
        self.activation = NativeFunction(library, "sensorium_activation", "@2P3l4i")
        self.argmax = NativeFunction(library, "sensorium_argmax", "@2P3l2i")
        self.rotary = NativeFunction(library, "sensorium_rotary", "@6P7l4i")
        self.write_kv = NativeFunction(library, "sensorium_write_kv", "@5P10li")
        self.attention = NativeFunction(library, "sensorium_attention", "@10P14l2f3i")
        self.pack = NativeFunction(library, "sensorium_pack", "@2P3l2i")
        self.linear = NativeFunction(library, "sensorium_linear", "@4P4l2i")
        add_quantized_functions(self, library)
        packed_bytes = library.sensorium_packed_bytes
        packed_bytes.argtypes = [ctypes.c_int, ctypes.c_long, ctypes.c_long]
        packed_bytes.restype = ctypes.c_long
        self.packed_bytes = packed_bytes
        self._use_tiles = library.sensorium_use_tiles
        self.use_tiles(True)

    def use_tiles(self, wanted: bool) -> bool:
        """Turn the use of matrix tiles (Intel AMX) for bfloat16 on or off; returns whether they are used.

        They aren't used if the machine, the compiler or the system doesn't support them. The last bits of results
        depend on this, so it must not change while a model runs.
        """
        return bool(self._use_tiles(wanted))


@cache
def _load() -> tuple[NativeLibrary | None, str | None]:
    """The library, or the reason why there is none, which is logged once.

    Raises:
        ConfigError: `SENSORIUM_NATIVE` names a library that doesn't exist.
    """
    wanted = os.environ.get("SENSORIUM_NATIVE", "1")
    if wanted == "0":
        reason = "SENSORIUM_NATIVE=0"
    else:
        try:
            return _open_library(wanted), None
        except (BuildError, OSError, AttributeError) as error:
            reason = str(error)
    logger.warning("CPU kernels: plain torch, which is several times slower (%s).", reason)
    return None, reason


def _open_library(wanted: str) -> NativeLibrary:
    """The fastest library if `wanted` is 1, else the one of that name. Compiles one if the package contains none."""
    prebuilt = prebuilt_libraries()
    if wanted in prebuilt:
        return NativeLibrary(prebuilt[wanted])
    if wanted != "1":
        raise ConfigError(
            f"SENSORIUM_NATIVE: got {wanted!r}, expected {', '.join(['0', '1', *prebuilt])}. "
            "Unset it, and the fastest kernels that this machine can run are used."
        )
    return NativeLibrary(next(iter(prebuilt.values()), None) or build_library())


def native_library() -> NativeLibrary | None:
    """The compiled kernels, or `None`. The first call may compile them, which takes some seconds."""
    return _load()[0]


def native_refusal() -> str | None:
    """Why the native kernels don't run here; `None` if they do."""
    return _load()[1]


def native_for(x: torch.Tensor) -> NativeLibrary | None:
    """The compiled kernels if they support such a tensor."""
    return _load()[0] if x.is_cpu and x.dtype in DTYPE_CODES else None


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """`x` `(..., n)` as `(rows, n)` with contiguous rows, copied only if necessary."""
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def token_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` `(T, H, D)` or `(T, H * D)` with each token's channels contiguous, copied only if necessary."""
    if x.dim() == 2:
        return x if x.stride(1) == 1 else x.contiguous()
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
