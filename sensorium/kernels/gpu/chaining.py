"""Kernels that are launched while their predecessor still runs (programmatic dependent launch).

A step of a small batch is a chain of short kernels, and between two of them the multiprocessors idle for about half a
microsecond. On GPUs of compute capability 9 and later, a kernel's launch can be prepared while its predecessor runs.
With `release_successor` its programs can even start, load what the predecessor doesn't write, such as weights, and
wait.

The rule: before `await_predecessor`, a kernel reads nothing that a kernel of the same step wrote, and writes nothing.
After it, all earlier kernels are complete and their writes visible, as in an ordinary launch.

A kernel releases its successor early only if that is a matrix product, which has weights to load, or has few programs.
Programs that start while most multiprocessors are busy crowd onto the few free ones: joining the shares of a long
sequence took three times as long when it was released early.

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
    """Wait until the predecessor has ended."""
    if IS_CHAINED:
        tl.extra.cuda.gdc_wait()


@triton.jit
def release_successor(IS_CHAINED: tl.constexpr):
    """Let the next kernel's programs start once all programs of this one have called this."""
    if IS_CHAINED:
        tl.extra.cuda.gdc_launch_dependents()


@cache
def chained(device: torch.device) -> dict[str, Any]:
    """The arguments of a launch on this device: `IS_CHAINED` of the kernel, and Triton's own."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9:
        return {"IS_CHAINED": True, "launch_pdl": True}
    return {"IS_CHAINED": False}
