"""A group of processes on one host that compute on CPUs and communicate through gloo over the loopback device."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from sensorium.distributed.process_group import MAX_WAIT_S, ProcessGroup

_c10d: Any = distributed


class GlooGroup(ProcessGroup):
    """See `ProcessGroup`. Tensors are on the CPU."""

    def _made(self, store: Any) -> Any:
        options = _c10d.ProcessGroupGloo._Options()  # noqa: SLF001 -- torch has no other way to choose a device
        options._timeout = timedelta(seconds=MAX_WAIT_S)  # noqa: SLF001
        options._devices = [_c10d.ProcessGroupGloo.create_device(hostname="127.0.0.1")]  # noqa: SLF001
        return _c10d.ProcessGroupGloo(store, self.rank, self.size, options)

    def _gather(self, gathered: torch.Tensor, tensor: torch.Tensor) -> Any:
        return self._group.allgather([list(gathered)], [tensor])
