"""Vision towers for items of any size, whose passes can be recorded and replayed.

To launch a tower kernel by kernel takes the host longer than a GPU needs for one picture. A recorded pass repeats the
same kernels on the same addresses, so whatever differs between two pictures of about the same size must be data: the
order of patches, where frames and windows begin, each patch's row and column. A `TowerPlan`, made on the host, holds
these arrays. Padding patches belong to no run, and their outputs are never read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

Grid: TypeAlias = tuple[int, int, int]
"""An item's size in patches: time, height, width."""
Int32Array: TypeAlias = npt.NDArray[np.int32]
TowerSize: TypeAlias = tuple[int, ...]
"""The numbers of patches, and of runs of each kind, that a recorded pass has room for."""

_ROW_STEP = 512
_SMALL_SIZES = (64, 128, 256)


@dataclass(frozen=True, slots=True, eq=False)
class TowerPlan:
    """One pass over the patches of some items.

    For example, two pictures of 4 and 8 patches have `starts {"frames": [0, 4, 12]}`; padded to 64 patches and 4
    frames, `[0, 4, 12, 12, 12]`.
    """

    num_patches: int
    by_patch: Mapping[str, Int32Array] = field(default_factory=dict)
    """Values of each patch, `(num_patches, ...)` each."""
    orders: Mapping[str, Int32Array] = field(default_factory=dict)
    """Permutations of the patches, or of groups of patches of equal size."""
    starts: Mapping[str, Int32Array] = field(default_factory=dict)
    """`(runs + 1,)` each: where each run of patches begins, and where the last one ends."""

    def size(self) -> TowerSize:
        """The smallest recorded size that fits: at most 511 patches more, and fewer than twice the runs."""
        runs = (1 << (len(each) - 2).bit_length() if len(each) > 2 else 1 for each in self.starts.values())
        return (_rounded(self.num_patches), *runs)

    def arrays(self, size: TowerSize | None = None) -> dict[str, Int32Array]:
        """All arrays by name, padded to `size` if that is given."""
        if size is None:
            return {**self.by_patch, **self.orders, **self.starts}
        num_patches, *runs = size
        arrays = {}
        for name, array in self.by_patch.items():
            arrays[name] = np.zeros((num_patches, *array.shape[1:]), dtype=np.int32)
            arrays[name][: len(array)] = array
        for name, order in self.orders.items():
            group = self.num_patches // len(order)
            arrays[name] = np.arange(num_patches // group, dtype=np.int32)
            arrays[name][: len(order)] = order
        for (name, starts), count in zip(self.starts.items(), runs, strict=True):
            arrays[name] = np.full(count + 1, starts[-1], dtype=np.int32)
            arrays[name][: len(starts)] = starts
        return arrays


def _rounded(num_patches: int) -> int:
    for size in _SMALL_SIZES:
        if num_patches <= size:
            return size
    return -(-num_patches // _ROW_STEP) * _ROW_STEP


class TowerRecorder(Protocol):
    """Replays recorded passes of one tower."""

    max_patches: int
    """The most patches of a recorded pass."""

    def run(self, pixel_values: torch.Tensor, plan: TowerPlan) -> torch.Tensor | None:
        """The pass's rows, or None if it can't be replayed and must be computed."""


class RecordableTower(nn.Module):
    """A tower whose pass depends on the items' sizes only through a `TowerPlan`: `compute` reads nothing else on the
    host."""

    recorder: TowerRecorder | None = None
    """Set by the worker if passes can be recorded."""
    merge_size: int
    """Side of the square of patches that becomes one row."""
    patch_width: int
    """Numbers in a patch."""

    def plan(self, grids: Sequence[Grid]) -> TowerPlan:
        """The plan of a pass over items of these sizes."""
        raise NotImplementedError

    def compute(self, pixel_values: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Rows `(patches / merge_size^2, decoder's width)`, given the arrays of a plan, int32, on the device."""
        raise NotImplementedError

    def forward(self, pixel_values: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """The rows of all items, concatenated, `(sum of t * h * w / merge_size^2, decoder's width)`.

        Args:
            pixel_values: `(sum of t * h * w, channels * temporal_patch_size * patch_size^2)`, in which the patches of
                each merged square are adjacent.
            grids: The items' sizes.
        """
        sizes = [t * h * w for t, h, w in grids]
        rows, first, begin = [], 0, 0
        for count in self._items_of_passes(sizes):
            end = begin + sum(sizes[first : first + count])
            rows.append(self._pass(pixel_values[begin:end], grids[first : first + count]))
            first, begin = first + count, end
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _items_of_passes(self, sizes: Sequence[int]) -> list[int]:
        """The number of items in each pass, given their numbers of patches: as many as a recorded pass has room for.

        Splitting loses nothing: a recorded pass of a few thousand patches keeps the device as busy as a longer one, and
        a pass that isn't recorded takes the host about as long to launch as the device to run.
        """
        if self.recorder is None:
            return [len(sizes)]
        counts: list[int] = []
        room = 0
        for size in sizes:
            if not counts or size > room:
                counts.append(0)
                room = self.recorder.max_patches
            counts[-1] += 1
            room -= size
        return counts

    def _pass(self, pixel_values: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        plan = self.plan(grids)
        if self.recorder is not None:
            rows = self.recorder.run(pixel_values, plan)
            if rows is not None:
                return rows
        device = pixel_values.device
        return self.compute(pixel_values, {name: _on(device, array) for name, array in plan.arrays().items()})


def towers_of(model: nn.Module) -> list[RecordableTower]:
    """The towers of a model whose passes can be recorded."""
    return [module for module in model.modules() if isinstance(module, RecordableTower)]


def _on(device: torch.device, array: npt.NDArray[Any]) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def starts_of(lengths: npt.NDArray[Any]) -> Int32Array:
    """The start of each run, and the end of the last one, `(runs + 1,)`."""
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)


def frame_starts(grids: Sequence[Grid]) -> Int32Array:
    """The start of each frame's patches, and the end of the last one's, `(frames + 1,)`."""
    return starts_of(np.concatenate([np.full(t, h * w) for t, h, w in grids]))


def patch_positions(grid: Grid, merge_size: int) -> Int32Array:
    """Row and column of each patch, `(t * h * w, 2)`, square by square.

    For example, the frames of a 2 x 4 grid with merge size 2 have the rows 0 0 1 1 0 0 1 1 and the columns
    0 1 0 1 2 3 2 3.
    """
    t, h, w = grid
    squares = (h // merge_size, merge_size, w // merge_size, merge_size)
    places = np.indices((h, w), dtype=np.int32).reshape(2, *squares).swapaxes(2, 3).reshape(2, -1)
    return np.tile(places.T, (t, 1))
