"""A group of processes on one host, each with its own GPU, that communicate through NCCL.

Collectives run in order on the stream of the step, and the host doesn't wait for them; a CUDA graph records them as it
records kernels. If a rank ends, the other ranks' GPUs go on waiting for it, so whoever notices must call `lose`.

Multicast over NVLink (NVLS) is off unless the environment enables it: if a program is killed while it uses NVLS, the
host's GPUs can become unusable for others.
"""

from __future__ import annotations

import os
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch
from torch import distributed

from sensorium.distributed.process_group import MAX_WAIT_S, ProcessGroup, now

_c10d: Any = distributed
_collectives: Any = import_module("torch._C._distributed_c10d")
ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    # A lost rank must raise an error in this engine; by default NCCL would end the whole process.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
}
"""Variables that are set before the first group is made, unless the user has set them."""


class NcclGroup(ProcessGroup):
    """See `ProcessGroup`. Tensors are on the current GPU."""

    def __init__(self, meeting_fd: int, rank: int, size: int, device: torch.device) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        super().__init__(meeting_fd, rank, size, device)
        self.least(0)  # the ranks connect at the first collective, which no graph may record

    def _made(self, store: Any) -> Any:
        options = _c10d.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=MAX_WAIT_S)  # noqa: SLF001 -- torch has no other name for it
        return _c10d.ProcessGroupNCCL(store, self.rank, self.size, options)

    def _gather(self, gathered: torch.Tensor, tensor: torch.Tensor) -> Any:
        options = now(_collectives.AllgatherOptions())
        return self._group._allgather_base(gathered, tensor, options)  # noqa: SLF001

    def lose(self) -> None:
        """See `ProcessGroup.lose`. Aborts the collectives that the device waits for."""
        super().lose()
        if self._group is not None:
            self._group.abort()

    def close(self) -> None:
        """See `TensorParallel.close`."""
        if self._group is not None and not self.is_lost:
            self._group.abort()  # no collective is in flight, and this doesn't wait for the other ranks
        super().close()
