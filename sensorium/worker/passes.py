"""Runs the model over one flat batch of chunks: arrays go to the device, media to their places, and passes are replayed
where they were recorded.

Owns the buffers and the recorded passes. The model runner decides which chunks share a pass, and uses its hidden
states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sensorium.attention import AttentionMetadata, CrossBatch, LayerCache
from sensorium.cache_spec import CacheKind
from sensorium.config import EngineConfig, ModelFeatures
from sensorium.distributed import ONE_RANK
from sensorium.errors import ModelError
from sensorium.messages import ScheduledChunk
from sensorium.model_executor.adapter_rows import adapter_ids_of_rows
from sensorium.model_executor.drivers import MediaRows, ModelDriver, StepInputs
from sensorium.model_executor.drivers.media_arguments import index_maps, kwargs_of_items
from sensorium.model_executor.layers.tower import towers_of
from sensorium.worker.block_tables import DeviceBlockTables
from sensorium.worker.decode_graphs import Decoded, DecodeGraphs
from sensorium.worker.encoder_runner import EncoderRunner
from sensorium.worker.graph_capture import GraphCapture
from sensorium.worker.input_batch import InputBatch, MediaSlice, StepArrays
from sensorium.worker.step_buffers import HostArray, StepBuffers, StepTensors
from sensorium.worker.tower_graphs import TowerGraphs
from sensorium.worker.trunk_graphs import MAX_CONTEXT, TrunkGraph, TrunkGraphs

Pieces = Sequence[tuple[int, MediaSlice]]
"""Media of a batch: the row of the batch at which a slice's chunk begins, and the slice."""


class PassRunner:
    """One per worker.

    Args:
        config: The engine's.
        model: For its `compute_logits`, in recorded decodes.
        driver: Runs the model.
        features: What loading found out about the model.
        kv_caches: An entry per layer with a cache.
        batch: The requests' slots.
        block_tables: The same tables on the device; None: there is no other memory than the host's.
        encoder: Has the rows of encoded media.
        last_tokens: `(num_slots + 1,)` int64 on the device: the token sampled last in each slot.
        capture: Records passes; None: every pass runs call by call.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: nn.Module,
        driver: ModelDriver,
        features: ModelFeatures,
        kv_caches: list[LayerCache],
        batch: InputBatch,
        block_tables: DeviceBlockTables | None,
        encoder: EncoderRunner,
        last_tokens: torch.Tensor,
        capture: GraphCapture | None,
    ) -> None:
        model_config = config.model_config
        self._group = config.parallel_config.group
        self._driver = driver
        self._kv_caches = kv_caches
        self._batch = batch
        self._block_tables = block_tables
        self._encoder = encoder
        self._last_tokens = last_tokens
        self._device = last_tokens.device
        self._dtype = model_config.dtype
        self._splits_media = features.splits_media
        self._buffers = StepBuffers(self._device)
        self.decodes: DecodeGraphs | None = None
        self.trunks: TrunkGraphs | None = None
        self.towers: list[TowerGraphs] = []
        if capture is not None:
            assert block_tables is not None
            tables, uses_mrope = block_tables.tables, model_config.uses_mrope
            towers_group = self._group if config.parallel_config.division.towers else ONE_RANK
            self.decodes = DecodeGraphs(
                capture,
                driver,
                model,
                kv_caches,
                self._buffers,
                tables,
                last_tokens,
                groups=batch.groups,
                uses_mrope=uses_mrope,
                max_model_len=model_config.max_model_len,
                group=self._group,
            )
            # What chunks write into the caches of cross-attention has sizes of its own: no two passes are alike.
            if not any(group.kind is CacheKind.CROSS for group in batch.groups):
                self.trunks = TrunkGraphs(
                    *(capture, driver, kv_caches, self._buffers, tables),
                    groups=batch.groups,
                    uses_mrope=uses_mrope,
                    max_sampled_rows=config.max_sampled_rows,
                    group=self._group,
                )
            for tower in towers_of(model):
                tower.recorder = graphs = TowerGraphs(capture, tower, self._device, self._dtype, towers_group)
                self.towers.append(graphs)

    def prepare(self) -> None:
        """Record the smallest size of each kind, to find out whether the model can be recorded at all."""
        for kind in (self.decodes, self.trunks):
            if kind is not None:
                kind.recorded.graph_for(1)

    def record_next(self) -> bool:
        """Record one more size, first those that were asked for and those of decodes; False: nothing is left to
        record."""
        has_recorded = any(tower.record_next() for tower in self.towers)
        if self.towers:  # ranks have encoded other items, and must go on to the others' passes together
            has_recorded = self._group.least(-int(has_recorded)) < 0
        if has_recorded:
            return True
        return any(kind.recorded.record_next() for kind in (self.decodes, self.trunks) if kind is not None)

    @property
    def refusals(self) -> list[str]:
        """Why passes aren't recorded any more, if they aren't."""
        kinds = [kind.recorded for kind in (self.decodes, self.trunks) if kind is not None]
        return [kind.refusal for kind in (*kinds, *self.towers) if kind.refusal is not None]

    def decode(self, arrays: StepArrays) -> Decoded | None:
        """Run a pass of decodes as a graph, with the greedy choice behind it; None: there is none for it."""
        if self.decodes is None or arrays.adapter_ids is not None:  # recorded passes are the base model's
            return None
        return self.decodes.run(arrays)

    def forward(
        self, chunks: Sequence[ScheduledChunk], arrays: StepArrays, fields: dict[str, HostArray]
    ) -> tuple[torch.Tensor, StepTensors]:
        """Hidden states `(num_tokens, hidden_size)` of any pass, and `fields` on the device.

        Raises:
            ModelError: `forward` of the model returned something else (a `TypeError`).
        """
        pieces = [
            (row, piece)
            for chunk, row in zip(chunks, arrays.cu_seqlens_q.tolist(), strict=False)
            for piece in self._batch.media_rows(chunk)
        ]
        graph = self._trunk_for(arrays, pieces)
        if graph is None:
            tensors = self._buffers.upload(fields)
            inputs = self._inputs(chunks, arrays, tensors, pieces)
            with adapter_ids_of_rows(tensors.adapter_ids, arrays.adapters):
                return _hidden_states(self._driver.forward(inputs)), tensors
        assert self.trunks is not None
        tensors = self.trunks.upload(graph, fields)
        media = self._gather_media(pieces) if pieces else None
        inputs = StepInputs(self._input_ids(tensors), tensors.positions, self._kv_caches, graph.metadata, media)
        return self.trunks.run(graph, inputs), tensors

    def _trunk_for(self, arrays: StepArrays, pieces: Pieces) -> TrunkGraph | None:
        if self.trunks is None or arrays.adapter_ids is not None or arrays.seq_lens.max() > MAX_CONTEXT:
            return None
        if arrays.row_spans is not None:  # recorded passes see earlier positions only
            return None
        if pieces and not (self._splits_media and self._driver.embeds_media):
            return None
        return self.trunks.recorded.graph_for(len(arrays.token_ids))

    def _inputs(
        self, chunks: Sequence[ScheduledChunk], arrays: StepArrays, tensors: StepTensors, pieces: Pieces
    ) -> StepInputs:
        maps = None
        kwargs = None
        if pieces and not self._splits_media:
            items = [piece.item for _, piece in pieces]
            maps = index_maps(items, chunks[0].num_computed_tokens)
            kwargs = kwargs_of_items(items, self._device, self._dtype)
        block_tables = self._tables_of(arrays, tensors)
        return StepInputs(
            input_ids=self._input_ids(tensors),
            positions=tensors.positions,
            kv_caches=self._kv_caches,
            attn_metadata=AttentionMetadata.of_step(
                arrays.query_lens,
                arrays.seq_lens,
                cu_seqlens_q=tensors.cu_seqlens_q,
                seq_lens_on_device=tensors.seq_lens,
                block_table=block_tables[0],
                slot_mapping=tensors.slot_mapping[0],
                multi_modal_placeholder_index_maps=maps,
            ).with_groups(
                self._batch.groups,
                block_tables,
                tensors.slot_mapping,
                tensors.state_rows,
                tensors.row_spans,
                cross=_cross_batch(arrays, tensors, block_tables),
            ),
            media=self._gather_media(pieces) if pieces and self._splits_media else None,
            media_kwargs=kwargs,
            encoder_outputs=None if arrays.cross_lens is None else self._encoder_outputs(chunks),
            token_type_ids=self._token_type_ids(chunks),
        )

    def _tables_of(self, arrays: StepArrays, tensors: StepTensors) -> list[torch.Tensor]:
        """The chunks' block tables in each group with blocks."""
        if self._block_tables is None:
            return [torch.from_numpy(table) for table in self._batch.block_tables(arrays)]
        tables = zip(self._block_tables.tables, self._batch.table_widths(arrays), strict=True)
        return [table[:, :width].index_select(0, tensors.slots) for table, width in tables]

    def _encoder_outputs(self, chunks: Sequence[ScheduledChunk]) -> torch.Tensor | None:
        """The rows that the chunks write into the caches of cross-attention, in the order of their places."""
        items = [item for chunk in chunks if chunk.cross_items for item in self._batch.written_items(chunk)]
        return torch.cat([self._encoder.all_rows(item.key) for item in items]) if items else None

    def _token_type_ids(self, chunks: Sequence[ScheduledChunk]) -> torch.Tensor | None:
        ids = self._batch.token_type_ids(chunks)
        return None if ids is None else torch.from_numpy(ids).to(self._device)

    def _input_ids(self, tensors: StepTensors) -> torch.Tensor:
        """The rows' token ids, those that the host hasn't seen included."""
        if tensors.pending_slots is None:
            return tensors.token_ids
        sampled = self._last_tokens[tensors.pending_slots.clamp(min=0)]
        return torch.where(tensors.pending_slots >= 0, sampled, tensors.token_ids)

    def _gather_media(self, pieces: Sequence[tuple[int, MediaSlice]]) -> MediaRows:
        placed = []
        for start, piece in pieces:
            encoded = self._encoder.rows(piece)
            assert encoded is not None, f"rows of {piece.item.key} are scheduled but were not encoded"
            placed.append((piece.chunk_rows + start, encoded))
        return MediaRows.of(placed, self._device)


def _cross_batch(arrays: StepArrays, tensors: StepTensors, block_tables: Sequence[torch.Tensor]) -> CrossBatch | None:
    """What layers of cross-attention see; None where there are none."""
    if arrays.cross_lens is None or tensors.cross_lens is None or tensors.cross_slots is None:
        return None
    lens = tuple(arrays.cross_lens.tolist())
    # The group stands behind those that keep positions.
    return CrossBatch(
        tensors.cross_lens, lens, max(lens, default=0), block_tables[-1], tensors.cross_slots, tensors.cross_before
    )


def _hidden_states(output: Any) -> torch.Tensor:
    """Check and return the result of `forward`. Raises `ModelError` (a `TypeError`)."""
    if not isinstance(output, torch.Tensor):
        raise ModelError(
            f"forward of the model: got a {type(output).__name__} from it, expected a tensor of hidden states "
            f"(num_tokens, hidden_size). Return that alone; compute_logits makes the logits."
        )
    return output
