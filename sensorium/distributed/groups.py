"""Which group ranks form, by where they compute."""

from __future__ import annotations

import torch

from sensorium.distributed.gloo import GlooGroup
from sensorium.distributed.nccl import NcclGroup
from sensorium.distributed.process_group import ProcessGroup


def join(device: torch.device, meeting_fd: int, rank: int, size: int) -> ProcessGroup:
    """The group of ranks of which this one computes on `device`. See `ProcessGroup` for the others, and what it
    raises."""
    if device.type == "cpu":
        return GlooGroup(meeting_fd, rank, size, device)
    torch.cuda.set_device(device)
    return NcclGroup(meeting_fd, rank, size, device)
