"""Passes of vision towers, recorded by their numbers of patches, frames and windows.

A size is recorded in idle time once it was asked for, or when it is asked for again: pictures of one size come in
numbers, and a size that never comes back isn't worth the time. Items that are larger together go through several
passes. A single one that is larger keeps the device busy for longer than it takes to launch its pass, which runs call
by call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sensorium.distributed import ONE_RANK, TensorParallel
from sensorium.logger import get_logger
from sensorium.model_executor.layers.tower import RecordableTower, TowerPlan, TowerSize
from sensorium.worker.graph_capture import GraphCapture, Replay, fail_together
from sensorium.worker.step_buffers import StepBuffers, packed_bytes

logger = get_logger(__name__)

MAX_PATCHES = 8192
MAX_GRAPHS = 32
"""Each holds its patches and its rows, some 25 MB for a picture of a million pixels."""
NUM_HOST_BUFFERS = 32
"""The passes of a few steps: none waits for the step before."""


@dataclass(slots=True, eq=False)
class _Graph:
    """One recorded size."""

    inputs: torch.Tensor
    """The bytes that a plan's arrays are copied to."""
    pixels: torch.Tensor
    rows: torch.Tensor | None = None
    replay: Replay = lambda: None


class TowerGraphs:
    """Runs one tower's passes as graphs.

    Args:
        capture: Records passes.
        tower: Whose passes.
        device: Where it is.
        dtype: Of patches.
        group: The ranks that share the tower, if it is divided.
    """

    def __init__(
        self,
        capture: GraphCapture,
        tower: RecordableTower,
        device: torch.device,
        dtype: torch.dtype,
        group: TensorParallel = ONE_RANK,
    ) -> None:
        self._group = group
        self._capture = capture
        self._tower = tower
        self._device = device
        self._dtype = dtype
        self._buffers = StepBuffers(device, NUM_HOST_BUFFERS)
        self._graphs: dict[TowerSize, _Graph] = {}
        self._asked: dict[TowerSize, tuple[TowerPlan, int]] = {}
        """Sizes that were asked for and aren't recorded: a plan of this size, and the width of a patch."""
        self.max_patches = MAX_PATCHES
        self.refusal: str | None = None
        """Why nothing is recorded any more."""

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, pixel_values: torch.Tensor, plan: TowerPlan) -> torch.Tensor | None:
        """See `TowerRecorder.run`."""
        if plan.num_patches > self.max_patches:
            return None
        size = plan.size()
        graph = self._graphs.get(size) or self._record_if_asked_again(size, plan, pixel_values.shape[1])
        if graph is None:
            return None
        self._buffers.upload_into(graph.inputs, plan.arrays(size))
        graph.pixels[: plan.num_patches].copy_(pixel_values)
        graph.replay()
        assert graph.rows is not None
        # The next pass overwrites them, and they are kept for longer.
        return graph.rows[: plan.num_patches // self._tower.merge_size**2].clone()

    def _record_if_asked_again(self, size: TowerSize, plan: TowerPlan, width: int) -> _Graph | None:
        if self._is_closed:
            return None
        if size in self._asked:
            return self._try(size)
        if len(self._asked) >= MAX_GRAPHS:
            del self._asked[next(iter(self._asked))]  # the oldest: sizes that nobody comes back with don't pile up
        self._asked[size] = (plan, width)
        return None

    @property
    def _is_closed(self) -> bool:
        return self.refusal is not None or len(self._graphs) >= MAX_GRAPHS

    def record_next(self) -> bool:
        """Record a size that was asked for; False: there is none."""
        if self._is_closed or not self._asked:
            return False
        self._try(next(iter(self._asked)))
        return True

    def _try(self, size: TowerSize) -> _Graph | None:
        plan, width = self._asked.pop(size)
        try:
            graph = self._graphs[size] = self._record(plan, size, width)
        except Exception as error:
            fail_together(self._group, error)
            self.refusal = f"{type(error).__name__}: {error}"
            logger.warning("passes of the tower can't be recorded and run call by call", exc_info=True)
            return None
        return graph

    def _record(self, plan: TowerPlan, size: TowerSize, width: int) -> _Graph:
        arrays = plan.arrays(size)
        graph = _Graph(
            torch.empty(packed_bytes(arrays), dtype=torch.uint8, device=self._device),
            torch.zeros(size[0], width, dtype=self._dtype, device=self._device),
        )
        tensors = self._buffers.upload_into(graph.inputs, arrays)

        def run() -> None:
            graph.rows = self._tower.compute(graph.pixels, tensors)

        graph.replay = self._capture.record(run)
        return graph
