"""Tensors on their way between the device and the host, so that the host can do other things meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def to_device(array: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    """An array as a tensor there; on CUDA from pinned memory, so that the host doesn't wait for the copy."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def new_event(*, enable_timing: bool = False) -> torch.cuda.Event:
    """An event that marks a place in what the device is given."""
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=enable_timing)  # type: ignore[no-untyped-call]
    return event


class HostCopy:
    """Copies of some tensors on the host, complete once `wait` returns.

    On the CPU they are the tensors themselves. On CUDA each is copied into pinned memory behind what the current
    stream has been given so far: later work on the stream may overwrite the originals, and isn't waited for.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tuple(tensors)
        self._event: torch.cuda.Event | None = None
        if any(tensor.is_cuda for tensor in tensors):
            self._tensors = tuple(
                torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
                for tensor in tensors
            )
            self._event = new_event()
            self._event.record()

    def wait(self) -> tuple[torch.Tensor, ...]:
        """The tensors on the host, in the order in which they were given."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._tensors
