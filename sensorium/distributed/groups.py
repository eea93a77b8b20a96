"""Chooses the process group for a device: gloo for CPUs, NCCL for GPUs."""

from __future__ import annotations

import torch

from sensorium.distributed.gloo import GlooGroup
from sensorium.distributed.nccl import NcclGroup
from sensorium.distributed.process_group import ProcessGroup


def join(device: torch.device, meeting_fd: int, rank: int, size: int) -> ProcessGroup:
    """Join the group of ranks, with this rank on `device`. See `ProcessGroup` for the other arguments and errors."""
    if device.type == "cpu":
        return GlooGroup(meeting_fd, rank, size, device)
    torch.cuda.set_device(device)
    return NcclGroup(meeting_fd, rank, size, device)
