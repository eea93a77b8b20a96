"""Passes in which every request decodes one token, recorded once per number of rows and then replayed.

A decoding step is hundreds of small kernels, and launching them one by one takes several times longer than running
them. A CUDA graph launches them all at once, but the host can't change what it does: it reads and writes the same
addresses, in the same sizes, each time. So a step's rows are padded to the next size that a graph exists for, and lie
where the graph reads them (`StepBuffers`); the block tables lie on the device for all slots, and the graph gathers the
rows that it needs.

Padding rows stand for nobody: they attend to one token of block 0, write no KV (their state goes to
a row that nobody reads), and sample into an entry that no slot
has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from sensorium.attention import NO_SLOT, AttentionMetadata, CrossBatch, LayerCache
from sensorium.cache_spec import CacheGroup, CacheKind
from sensorium.distributed import ONE_RANK, TensorParallel
from sensorium.kernels import largest
from sensorium.model_executor.drivers import ModelDriver, StepInputs
from sensorium.model_executor.layers.sampler import SamplerOutput
from sensorium.model_executor.sampling_metadata import SamplingMetadata
from sensorium.worker.graph_capture import UNREADABLE, GraphCapture, RecordedSizes, Replay
from sensorium.worker.input_batch import StepArrays
from sensorium.worker.step_buffers import HostArray, StepBuffers, nobodys_rows, packed_bytes


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """The results of a pass of decodes on the device, row by row. The next pass overwrites it."""

    logits: torch.Tensor
    """`(num_rows, vocab_size)`"""
    best: SamplerOutput
    """The greedy choice of each row."""
    slots: torch.Tensor
    """`(num_rows,)` int64"""


@dataclass(slots=True, eq=False)
class _Graph:
    """One recorded size."""

    size: int
    inputs: torch.Tensor
    """The bytes that a step's arrays are copied to."""
    replay: Replay = lambda: None
    logits: torch.Tensor | None = None
    token_ids: torch.Tensor | None = None
    best_logits: torch.Tensor | None = None
    slots: torch.Tensor | None = None


class DecodeGraphs:
    """Runs decodes as graphs.

    Args:
        capture: Records passes.
        driver: Runs the model.
        model: For its `compute_logits`.
        kv_caches: An entry per layer with a cache.
        buffers: Brings the steps' arrays to the device.
        block_tables: `(num_tables, num_slots + 1, max_blocks)` int32 on the device; the last row belongs to no request.
        last_tokens: `(num_slots + 1,)` int64 on the device: the token sampled last in each slot. Written here.
        groups: The model's cache groups.
        uses_mrope: Whether positions have three rows.
        max_model_len: Bound on the sequences' lengths.
        group: The ranks that share the model.
    """

    def __init__(
        self,
        capture: GraphCapture,
        driver: ModelDriver,
        model: nn.Module,
        kv_caches: list[LayerCache],
        buffers: StepBuffers,
        block_tables: torch.Tensor,
        last_tokens: torch.Tensor,
        *,
        groups: Sequence[CacheGroup],
        uses_mrope: bool,
        max_model_len: int,
        group: TensorParallel = ONE_RANK,
    ) -> None:
        self._capture = capture
        self._driver = driver
        self._model: Any = model
        self._kv_caches = kv_caches
        self._buffers = buffers
        self._block_tables = block_tables
        self._last_tokens = last_tokens
        self._groups = tuple(groups)
        self._uses_mrope = uses_mrope
        self._max_model_len = max_model_len
        self._group = group
        self._nobody = len(last_tokens) - 1
        self.recorded = RecordedSizes("decoding steps", graph_sizes(self._nobody), self._record, group)

    def run(self, arrays: StepArrays) -> Decoded | None:
        """Run a step of one row per request; None if it can't be done as a graph."""
        num_rows = len(arrays.slots)
        graph = self.recorded.graph_for(num_rows)
        if graph is None:
            return None
        self._buffers.upload_into(graph.inputs, self._padded(arrays, graph.size))
        graph.replay()
        assert graph.logits is not None
        assert graph.token_ids is not None
        assert graph.best_logits is not None
        assert graph.slots is not None
        best = SamplerOutput(graph.token_ids[:num_rows], graph.best_logits[:num_rows])
        return Decoded(graph.logits[:num_rows], best, graph.slots[:num_rows])

    def _record(self, size: int) -> _Graph:
        padding = self._padded(None, size)
        device = self._last_tokens.device
        graph = _Graph(size, torch.empty(packed_bytes(padding), dtype=torch.uint8, device=device))
        tensors = self._buffers.upload_into(graph.inputs, padding)
        graph.slots = tensors["slots"]

        def run() -> None:
            graph.logits, graph.token_ids, graph.best_logits = self._decode(tensors, size)

        graph.replay = self._capture.record(run)
        return graph

    def _decode(self, tensors: dict[str, torch.Tensor], size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The pass itself: logits, the best tokens, and their logits."""
        pending = tensors["pending_slots"]
        token_ids = torch.where(pending >= 0, self._last_tokens[pending.clamp(min=0)], tensors["token_ids"])
        block_tables = [table.index_select(0, tensors["slots"]) for table in self._block_tables]
        metadata = AttentionMetadata(
            num_tokens=size,
            num_seqs=size,
            cu_seqlens_q=tensors["cu_seqlens_q"],
            seq_lens=tensors["seq_lens"],
            block_table=block_tables[0],
            slot_mapping=tensors["slot_mapping"][0],
            max_seqlen_q=1,
            max_seq_len=self._max_model_len,
            num_prefill_tokens=0,
            num_decode_tokens=size,
            query_lens_host=UNREADABLE,
            seq_lens_host=UNREADABLE,
            is_recorded=True,
        ).with_groups(
            self._groups,
            block_tables,
            tensors["slot_mapping"],
            tensors.get("state_rows"),
            cross=self._cross_batch(tensors, block_tables),
        )
        hidden = self._driver.forward(StepInputs(token_ids, tensors["positions"], self._kv_caches, metadata))
        logits = self._model.compute_logits(hidden, SamplingMetadata(size))
        best_ids, best_logits = largest(logits)
        best_ids = self._group.broadcast(best_ids)
        self._last_tokens.index_copy_(0, tensors["slots"], best_ids)
        return logits, best_ids, best_logits

    def _cross_batch(self, tensors: dict[str, torch.Tensor], block_tables: list[torch.Tensor]) -> CrossBatch | None:
        """What layers of cross-attention see, which write nothing here; None where there are none."""
        for group, table in zip(self._groups, block_tables, strict=False):
            if group.kind is CacheKind.CROSS:
                nothing = tensors["slots"][:0]
                return CrossBatch(tensors["cross_lens"], UNREADABLE, group.max_rows, table, nothing)
        return None

    def _padded(self, arrays: StepArrays | None, size: int) -> dict[str, HostArray]:
        """The arrays of a step by name, with padding rows after its own; None: nothing but these."""
        num_rows = 0 if arrays is None else len(arrays.slots)
        fields: dict[str, HostArray] = {
            "token_ids": np.zeros(size, dtype=np.int64),
            "positions": np.zeros((3, size) if self._uses_mrope else size, dtype=np.int64),
            "slot_mapping": np.full((len(self._block_tables), size), NO_SLOT, dtype=np.int64),
            "cu_seqlens_q": np.arange(size + 1, dtype=np.int32),
            "seq_lens": np.ones(size, dtype=np.int32),
            "slots": np.full(size, self._nobody, dtype=np.int64),
            "pending_slots": np.full(size, -1, dtype=np.int64),
        }
        if (state_rows := nobodys_rows(self._groups, size)) is not None:
            fields["state_rows"] = state_rows
        if any(group.kind is CacheKind.CROSS for group in self._groups):
            fields["cross_lens"] = np.ones(size, dtype=np.int32)
        if arrays is not None:
            if arrays.cross_lens is not None:
                fields["cross_lens"][:num_rows] = arrays.cross_lens
            for name in ("token_ids", "positions", "slot_mapping", "seq_lens", "slots"):
                fields[name][..., :num_rows] = getattr(arrays, name)
            if arrays.state_rows is not None:
                fields["state_rows"][:, :num_rows] = arrays.state_rows
            if arrays.pending_slots is not None:
                fields["pending_slots"][:num_rows] = arrays.pending_slots
        return fields


def graph_sizes(max_rows: int) -> list[int]:
    """Numbers of rows that graphs are recorded for: the next one is at most a third larger, from 8 on.

    Worked example for 100 rows: 1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 100.
    """
    sizes = [1, 2, 4, 8, 16, 24, 32]
    while sizes[-1] < max_rows:
        sizes.append(sizes[-1] + max(16, sizes[-1] // 64 * 16))
    return [*(size for size in sizes if size < max_rows), max_rows]
