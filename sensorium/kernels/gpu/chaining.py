"""Kernels that are launched while the one before them still runs (programmatic dependent launch).

A step of a small batch is a chain of short kernels, and between two of them the processors idle for about half a
microsecond. On GPUs of compute capability 9 and later a kernel's launch may be prepared while the one before it runs,
and with `release_successor` its programs even be put on the processors, where they load what that one doesn't write,
such as weights, and wait.

The rule: before `await_predecessor` a kernel reads nothing that a kernel of the same step wrote, and writes nothing.
Behind it everything before is complete and visible, as without all this.

A kernel releases its successor early only if that is a matrix product, which has weights to load, or has few programs.
Programs that are put on busy processors crowd on few of them: joining the shares of a long sequence took three times as
long when it was launched early.

Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def await_predecessor(IS_CHAINED: tl.constexpr):
    """Wait until the kernel before has ended."""
    if IS_CHAINED:
        tl.extra.cuda.gdc_wait()


@triton.jit
def release_successor(IS_CHAINED: tl.constexpr):
    """Let the next kernel be put on the processors, once all programs of this one have come here."""
    if IS_CHAINED:
        tl.extra.cuda.gdc_launch_dependents()


@cache
def chained(device: torch.device) -> dict[str, Any]:
    """The arguments of a launch on this device: `IS_CHAINED` of the kernel, and Triton's own."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9:
        return {"IS_CHAINED": True, "launch_pdl": True}
    return {"IS_CHAINED": False}
