"""The platform of the process, as torch sees it."""

from __future__ import annotations

import torch

from sensorium.compat.v0.vllm.attention.selector import _Backend

__all__ = ["_Backend", "current_platform"]


class _Platform:
    """CUDA devices where torch sees some, else the CPU."""

    @property
    def device_type(self) -> str:
        """As in `torch.device.type`."""
        return "cuda" if self.is_cuda() else "cpu"

    def is_cuda(self) -> bool:
        """Whether there is a CUDA device."""
        return torch.cuda.is_available()

    def is_cuda_alike(self) -> bool:
        """The same."""
        return self.is_cuda()

    def is_cpu(self) -> bool:
        """Whether there is none."""
        return not self.is_cuda()

    def __getattr__(self, name: str) -> object:
        if name.startswith("is_"):  # is_tpu, is_rocm, ...: other kinds of devices are not served
            return lambda: False
        raise AttributeError(f"current_platform has no attribute {name!r} for plug-ins. Ask torch.")


current_platform = _Platform()
