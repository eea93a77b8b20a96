"""Passes of any mix of prefill chunks and decodes, recorded by number of rows: from the rows that enter the decoder to
its hidden states.

Short steps with prefills in them (a cached prompt with a new question, a few arrivals beside streams) take the device
less time than the host needs to launch them. Long ones don't, and are not recorded. Embedding, putting media rows in
their places, and what comes behind the hidden states run call by call: they are few launches.

Passes with rows of a two-way span run call by call too: they hold a whole picture, and so are not the shortest.

Padding rows belong to no sequence: they write no KV, nothing attends to them, and what becomes of them is not read.
Sequences that aren't there have no rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sensorium.attention import NO_SLOT, AttentionMetadata, LayerCache
from sensorium.cache_spec import CacheGroup
from sensorium.distributed import ONE_RANK, TensorParallel
from sensorium.model_executor.drivers import ModelDriver, StepInputs
from sensorium.worker.graph_capture import UNREADABLE, GraphCapture, RecordedSizes, Replay
from sensorium.worker.step_buffers import HostArray, StepBuffers, StepTensors, nobodys_rows, packed_bytes

MAX_ROWS = 2048
"""Longer passes keep the device busy for longer than it takes to launch them."""
MAX_CONTEXT = 8192
"""Tokens of the longest sequence. In a recorded pass nobody knows how many rows are decodes, so their keys are split
over few programs."""


@dataclass(slots=True, eq=False)
class TrunkGraph:
    """One recorded size."""

    size: int
    padding: dict[str, HostArray]
    """The arrays of a step of nobody."""
    inputs: torch.Tensor
    """The bytes that a step's arrays are copied to."""
    metadata: AttentionMetadata
    rows: torch.Tensor | None = None
    """`(size, hidden_size)`: what enters the decoder, where the driver makes it; its ids otherwise, `(size,)`."""
    hidden: torch.Tensor | None = None
    replay: Replay = lambda: None


class TrunkGraphs:
    """Runs mixed passes as graphs.

    Args:
        capture: Records passes.
        driver: Runs the model.
        kv_caches: An entry per layer with a cache.
        buffers: Brings the steps' arrays to the device.
        block_tables: `(num_tables, num_slots + 1, max_blocks)` int32 on the device; the last row belongs to nobody.
        groups: The model's cache groups.
        uses_mrope: Whether positions have three rows.
        max_sampled_rows: Rows that a step may sample after.
        group: The ranks that share the model.
    """

    def __init__(
        self,
        capture: GraphCapture,
        driver: ModelDriver,
        kv_caches: list[LayerCache],
        buffers: StepBuffers,
        block_tables: torch.Tensor,
        *,
        groups: Sequence[CacheGroup],
        uses_mrope: bool,
        max_sampled_rows: int,
        group: TensorParallel = ONE_RANK,
    ) -> None:
        self._max_sampled_rows = max_sampled_rows
        self._capture = capture
        self._driver = driver
        self._kv_caches = kv_caches
        self._buffers = buffers
        self._block_tables = block_tables
        self._groups = tuple(groups)
        self._uses_mrope = uses_mrope
        self._nobody = block_tables.shape[1] - 1
        self.recorded = RecordedSizes("mixed steps", trunk_sizes(), self._record, group)

    def upload(self, graph: TrunkGraph, arrays: Mapping[str, HostArray]) -> StepTensors:
        """Bring a step's arrays to where the graph reads them; returns views of the step's own part."""
        padded = {}
        for name, empty in graph.padding.items():
            array = arrays.get(name)
            if array is not None:
                padded[name] = empty.copy()
                padded[name][..., : array.shape[-1]] = array
            else:
                padded[name] = empty
        # Sequences that aren't there begin and end where the last one ends.
        padded["cu_seqlens_q"][len(arrays["cu_seqlens_q"]) :] = arrays["cu_seqlens_q"][-1]
        views = self._buffers.upload_into(graph.inputs, padded)
        return StepTensors(**{name: views[name][..., : array.shape[-1]] for name, array in arrays.items()})

    def run(self, graph: TrunkGraph, inputs: StepInputs) -> torch.Tensor:
        """Hidden states `(num_tokens, hidden_size)` of a step that was uploaded. The next pass overwrites them."""
        rows = self._driver.embed(inputs)
        rows = inputs.input_ids if rows is None else rows
        assert graph.rows is not None
        assert graph.hidden is not None
        graph.rows[: len(rows)].copy_(rows)
        graph.replay()
        return graph.hidden[: len(rows)]

    def _record(self, size: int) -> TrunkGraph:
        padding = self._padding(size)
        inputs = torch.empty(packed_bytes(padding), dtype=torch.uint8, device=self._block_tables.device)
        tensors = self._buffers.upload_into(inputs, padding)
        graph = TrunkGraph(size, padding, inputs, self._metadata(tensors, size))
        step = StepInputs(tensors["token_ids"], tensors["positions"], self._kv_caches, graph.metadata)
        embeds = self._driver.embed(step)
        graph.rows = torch.zeros_like(step.input_ids) if embeds is None else embeds.clone()

        def run() -> None:
            ids, rows = (graph.rows, None) if embeds is None else (step.input_ids, graph.rows)
            assert ids is not None
            metadata = self._metadata(tensors, size)
            graph.hidden = self._driver.forward(
                StepInputs(ids, step.positions, self._kv_caches, metadata, inputs_embeds=rows)
            )

        graph.replay = self._capture.record(run)
        return graph

    def _metadata(self, tensors: Mapping[str, torch.Tensor], size: int) -> AttentionMetadata:
        num_seqs = len(tensors["slots"])
        block_tables = [table.index_select(0, tensors["slots"]) for table in self._block_tables]
        return AttentionMetadata(
            num_tokens=size,
            num_seqs=num_seqs,
            cu_seqlens_q=tensors["cu_seqlens_q"],
            seq_lens=tensors["seq_lens"],
            block_table=block_tables[0],
            slot_mapping=tensors["slot_mapping"][0],
            max_seqlen_q=size,
            max_seq_len=MAX_CONTEXT,
            num_prefill_tokens=UNREADABLE,
            num_decode_tokens=UNREADABLE,
            query_lens_host=UNREADABLE,
            seq_lens_host=UNREADABLE,
            is_recorded=True,
        ).with_groups(self._groups, block_tables, tensors["slot_mapping"], tensors.get("state_rows"))

    def _padding(self, size: int) -> dict[str, HostArray]:
        num_seqs, num_sampled = min(size, self._nobody), min(size, self._max_sampled_rows)
        state_rows = nobodys_rows(self._groups, num_seqs)
        return {
            "token_ids": np.zeros(size, dtype=np.int64),
            "positions": np.zeros((3, size) if self._uses_mrope else size, dtype=np.int64),
            "slot_mapping": np.full((len(self._block_tables), size), NO_SLOT, dtype=np.int64),
            "cu_seqlens_q": np.zeros(num_seqs + 1, dtype=np.int32),
            "seq_lens": np.zeros(num_seqs, dtype=np.int32),
            "slots": np.full(num_seqs, self._nobody, dtype=np.int64),
            "sampled_rows": np.zeros(num_sampled, dtype=np.int64),
            "sampled_slots": np.full(num_sampled, self._nobody, dtype=np.int64),
            "pending_slots": np.full(size, -1, dtype=np.int64),
            **({} if state_rows is None else {"state_rows": state_rows}),
        }


def trunk_sizes() -> list[int]:
    """Numbers of rows that graphs are recorded for."""
    return [16, 32, 64, 96, 128, 192, 256, 384, 512, 640, 768, 896, 1024, 1280, 1536, 1792, MAX_ROWS]
