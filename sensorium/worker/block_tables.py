"""The block tables of all slots on the device, one for each cache group, kept up to date by what each step adds."""

from __future__ import annotations

import numpy as np
import torch


class DeviceBlockTables:
    """Row `slot` of a group holds the block ids of the request in that slot, and entries behind them mean nothing.

    Block ids are sent once, when they are given out: a step's own table is gathered on the device. One more row than
    there are slots is for padding and belongs to no request.
    """

    def __init__(self, num_groups: int, num_slots: int, max_blocks: int, device: torch.device) -> None:
        self.tables = torch.zeros((num_groups, num_slots + 1, max_blocks), dtype=torch.int32, device=device)
        """`(num_groups, num_slots + 1, max_blocks)`"""
        self._device = device
        self._index: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
        self._ids: list[np.ndarray[tuple[int], np.dtype[np.int32]]] = []

    def append(
        self, group: int, slot: int, num_blocks: int, block_ids: np.ndarray[tuple[int], np.dtype[np.int32]]
    ) -> None:
        """Note blocks that follow the first `num_blocks` of a slot."""
        _, num_rows, max_blocks = self.tables.shape
        first = (group * num_rows + slot) * max_blocks + num_blocks
        self._index.append(np.arange(first, first + len(block_ids), dtype=np.int64))
        self._ids.append(block_ids)

    def flush(self) -> None:
        """Bring what was noted to the device, in the order of the current stream."""
        if not self._index:
            return
        index = np.concatenate(self._index)
        packed = torch.from_numpy(np.stack([index, np.concatenate(self._ids)]))
        if self._device.type == "cuda":
            packed = packed.pin_memory().to(self._device, non_blocking=True)
        self.tables.view(-1).index_copy_(0, packed[0], packed[1].to(torch.int32))
        self._index, self._ids = [], []
