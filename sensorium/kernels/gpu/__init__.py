"""Kernels for CUDA in Triton, one idea per file. Each does what the twin of the same name in `sensorium.kernels` does.

Only the functions there import these files, which import Triton, and call them for tensors that `on_gpu` accepts.
Nothing here waits for the device, and no launch depends on values in its memory, so every call can be captured in a
CUDA graph. Numbers that change from step to step are never compile-time constants.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""The storage types. All arithmetic is in float32."""


def on_gpu(x: torch.Tensor) -> bool:
    """Whether the kernels here support such a tensor."""
    return x.is_cuda and x.dtype in DTYPES and has_triton()


@cache
def has_triton() -> bool:
    """Whether Triton is installed, without importing it."""
    return find_spec("triton") is not None


@cache
def num_processors(device: torch.device) -> int:
    """A GPU's number of streaming multiprocessors; a small number elsewhere, where kernels are interpreted."""
    if device.type != "cuda":
        return 4
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
