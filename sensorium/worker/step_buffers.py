"""Brings a step's arrays to the device: one copy from pinned memory, into memory at fixed addresses.

On the CPU nothing is copied: the tensors are views of the arrays.

Every array of a step is packed into one buffer of bytes at an offset that follows from the arrays' sizes alone, so
steps of the same sizes have their arrays at the same addresses. That is what a CUDA graph needs, which reads the same
addresses at each replay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from sensorium.cache_spec import CacheGroup
from sensorium.model_executor.host_copy import new_event
from sensorium.worker.input_batch import Int64Array, StepArrays
from sensorium.worker.kv_cache import unread_row, zero_row

HostArray: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
"""Of int32 or int64."""
_ALIGNMENT = 16
"""Bytes. Kernels load 16 at once."""
NUM_HOST_BUFFERS = 4
"""A buffer is written again only when its copy has ended; with more buffers than steps in flight, that takes no
wait."""


@dataclass(frozen=True, slots=True, eq=False)
class StepTensors:
    """A step's arrays on the device. Shapes and meanings are those of `StepArrays`."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    cu_seqlens_q: torch.Tensor
    """`(num_chunks + 1,)` int32"""
    seq_lens: torch.Tensor
    slots: torch.Tensor
    """`(num_chunks,)` int64: of each chunk's request."""
    sampled_rows: torch.Tensor
    """`(num_sampled,)` int64: rows of the batch after which a token is sampled."""
    sampled_slots: torch.Tensor
    """`(num_sampled,)` int64: the slots of their requests."""
    state_rows: torch.Tensor | None = None
    pending_slots: torch.Tensor | None = None
    """`(num_tokens,)` int64: the slot whose last sampled token stands in this row, -1 where the host knew the token;
    None where it knew all."""
    adapter_ids: torch.Tensor | None = None
    row_spans: torch.Tensor | None = None
    cross_lens: torch.Tensor | None = None
    cross_slots: torch.Tensor | None = None
    cross_before: torch.Tensor | None = None


def host_fields(arrays: StepArrays, sampled_rows: Int64Array, sampled_slots: Int64Array) -> dict[str, HostArray]:
    """The arrays of `StepTensors` by name."""
    fields: dict[str, HostArray] = {
        "token_ids": arrays.token_ids,
        "positions": arrays.positions,
        "slot_mapping": arrays.slot_mapping,
        "cu_seqlens_q": arrays.cu_seqlens_q,
        "seq_lens": arrays.seq_lens,
        "slots": arrays.slots,
        "sampled_rows": sampled_rows,
        "sampled_slots": sampled_slots,
    }
    if arrays.state_rows is not None:
        fields["state_rows"] = arrays.state_rows
    if arrays.pending_slots is not None:
        fields["pending_slots"] = arrays.pending_slots
    for name in ("adapter_ids", "row_spans", "cross_lens", "cross_slots", "cross_before"):
        if (array := getattr(arrays, name)) is not None:
            fields[name] = array
    return fields


def nobodys_rows(groups: Sequence[CacheGroup], count: int) -> Int64Array | None:
    """`StepArrays.state_rows` of `count` sequences that are padding; None where no layer has a state."""
    for group in groups:
        if not group.is_paged:
            return np.tile(np.array([[zero_row(group)], [unread_row(group)]], dtype=np.int64), (1, count))
    return None


class StepBuffers:
    """Invariant: what a call returned stays as it is until the next call's copy, which the device does in order.

    Args:
        device: Where arrays go.
        num_host_buffers: Copies that may be on their way. One more waits for the first of them.
    """

    def __init__(self, device: torch.device, num_host_buffers: int = NUM_HOST_BUFFERS) -> None:
        self._device = device
        self._num_host_buffers = num_host_buffers
        self._target = torch.empty(0, dtype=torch.uint8, device=device)
        self._staging: list[_HostBuffer] = []
        self._next = 0

    def upload(self, arrays: Mapping[str, HostArray]) -> StepTensors:
        """The arrays as tensors on the device."""
        if self._device.type == "cpu":
            tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        else:
            num_bytes = packed_bytes(arrays)
            if len(self._target) < num_bytes:
                self._target = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
            tensors = self.upload_into(self._target, arrays)
        return StepTensors(**tensors)

    def upload_into(self, target: torch.Tensor, arrays: Mapping[str, HostArray]) -> dict[str, torch.Tensor]:
        """Copy the arrays into `target`, bytes on the device; returns views of it."""
        staging = self._free_staging(packed_bytes(arrays))
        offsets = staging.pack(arrays)
        staging.send(target)
        return {name: _view(target, offsets[name], array) for name, array in arrays.items()}

    def _free_staging(self, num_bytes: int) -> _HostBuffer:
        """Wait for the buffer that was used longest ago, and make it large enough."""
        if len(self._staging) < self._num_host_buffers:
            self._staging.append(_HostBuffer(self._device))
        staging = self._staging[self._next % len(self._staging)]
        self._next += 1
        staging.prepare(num_bytes)
        return staging


class _HostBuffer:
    """Pinned memory, from which the device copies."""

    def __init__(self, device: torch.device) -> None:
        self._pins = device.type == "cuda"
        self._copied: torch.cuda.Event | None = None
        self._resize(1 << 16)

    def prepare(self, num_bytes: int) -> None:
        """Wait until the last copy from here has ended, and grow the buffer if needed."""
        if self._copied is not None:
            self._copied.synchronize()
        if len(self._bytes) < num_bytes:
            self._resize(2 * num_bytes)

    def pack(self, arrays: Mapping[str, HostArray]) -> dict[str, int]:
        """Write the arrays one behind the other; returns where each begins."""
        offsets = {}
        self._num_bytes = 0
        for name, array in arrays.items():
            offsets[name] = self._num_bytes
            part = self._array[self._num_bytes : self._num_bytes + array.nbytes]
            part.view(array.dtype)[:] = array.ravel()
            self._num_bytes += _padded(array.nbytes)
        return offsets

    def send(self, target: torch.Tensor) -> None:
        """Begin to copy what was packed to the first bytes of `target`."""
        target[: self._num_bytes].copy_(self._bytes[: self._num_bytes], non_blocking=True)
        if self._pins:
            self._copied = self._copied or new_event()
            self._copied.record()

    def _resize(self, num_bytes: int) -> None:
        self._bytes = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._pins)
        self._array = self._bytes.numpy()


def packed_bytes(arrays: Mapping[str, HostArray]) -> int:
    """Bytes that the arrays take when packed."""
    return sum(_padded(array.nbytes) for array in arrays.values())


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _view(buffer: torch.Tensor, offset: int, array: HostArray) -> torch.Tensor:
    dtype = torch.int64 if array.dtype == np.int64 else torch.int32
    assert array.dtype in (np.int64, np.int32)
    return buffer[offset : offset + array.nbytes].view(dtype).view(array.shape)
