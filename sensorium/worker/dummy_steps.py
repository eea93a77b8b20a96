"""Steps that belong to no request: a model is run with them at load, over a small cache of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sensorium.attention import AttentionMetadata, CrossBatch, LayerCache, compute_row_spans, compute_slot_mapping
from sensorium.cache_spec import CacheGroup, CacheKind
from sensorium.config import EngineConfig
from sensorium.model_executor.drivers import MediaRows, StepInputs
from sensorium.spans import Range
from sensorium.worker.input_batch import spans_in
from sensorium.worker.kv_cache import CacheLayout, zero_row

IdArray = npt.NDArray[np.int64]
MAX_SEQUENCES = 3
"""In one step."""


class DummySteps:
    """Makes steps as the model runner would, for sequences that lie in a cache from its first block on."""

    def __init__(self, config: EngineConfig, layout: CacheLayout, device: torch.device) -> None:
        self.device = device
        self.dtype = config.model_config.dtype
        self._layout = layout
        self._block_size = config.cache_config.block_size
        self._uses_mrope = config.model_config.uses_mrope

    def caches(self, num_tokens: int, num_sequences: int = 1) -> list[LayerCache]:
        """KV caches that hold so many sequences of so many tokens, unrounded: what is tried out is the model."""
        assert num_sequences <= MAX_SEQUENCES
        groups = self._groups(num_sequences * self._blocks_for(num_tokens))
        return self._layout.allocate(groups, self.device, dtype=self.dtype)

    def _groups(self, num_blocks: int) -> tuple[CacheGroup, ...]:
        kinds = self._layout.kinds
        return self._layout.groups([MAX_SEQUENCES if kind is CacheKind.STATE else num_blocks for kind in kinds])

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def step(
        self,
        pieces: Sequence[tuple[IdArray, int, int]],
        caches: list[LayerCache],
        *,
        media: MediaRows | None = None,
        maps: Mapping[str, Any] | None = None,
        places: Sequence[IdArray | None] = (),
        two_way: Sequence[Sequence[Range]] = (),
        encoder_outputs: torch.Tensor | None = None,
    ) -> StepInputs:
        """One step of pieces `(token_ids, start, end)`: those tokens of each sequence, in the cache's order.

        `media`: rows of the batch. `maps`: for models that merge by `multi_modal_placeholder_index_maps`. `places`: of
        each sequence the positions `(3, num_tokens)`; None, or left out: its tokens are counted.
        `two_way`: of each sequence the spans whose positions see one another both ways. `encoder_outputs`: rows for
        cross-attention, of the only sequence.
        """
        query_lens = np.array([end - start for _, start, end in pieces], dtype=np.int32)
        seq_lens = np.array([end for _, _, end in pieces], dtype=np.int32)
        num_blocks = max(self._blocks_for(len(ids)) for ids, _, _ in pieces)
        table = np.arange(num_blocks * len(pieces), dtype=np.int32).reshape(len(pieces), num_blocks)
        positions = indices = np.concatenate([np.arange(start, end, dtype=np.int64) for _, start, end in pieces])
        if self._uses_mrope:
            positions = np.tile(positions, (3, 1))
            row = 0
            for (_, start, end), given in zip(pieces, places, strict=False):
                if given is not None:
                    positions[:, row : row + end - start] = given[:, start:end]
                row += end - start
        ids = np.concatenate([ids[start:end] for ids, start, end in pieces])
        groups = self._groups(table.size)
        metadata = AttentionMetadata.from_numpy(
            query_lens,
            seq_lens,
            table,
            compute_slot_mapping(table, query_lens, seq_lens, self._block_size),
            device=self.device,
            multi_modal_placeholder_index_maps=maps,
        )
        return StepInputs(
            input_ids=torch.from_numpy(ids).to(self.device),
            positions=torch.from_numpy(positions).to(self.device),
            kv_caches=caches,
            attn_metadata=metadata.with_groups(
                groups,
                [metadata.block_table] * len(groups),
                metadata.slot_mapping.expand(len(groups), -1),
                self._state_rows(groups, [start for _, start, _ in pieces]),
                self._row_spans(groups, compute_row_spans(two_way, query_lens, seq_lens), indices),
                cross=self._cross_batch(len(pieces), encoder_outputs)
                if CacheKind.CROSS in self._layout.kinds
                else None,
            ),
            media=media,
            encoder_outputs=encoder_outputs,
        )

    def _row_spans(
        self, groups: Sequence[CacheGroup], rows: npt.NDArray[np.int32] | None, indices: IdArray
    ) -> torch.Tensor | None:
        if rows is None:
            return None
        return torch.from_numpy(np.stack([spans_in(each, rows, indices) for each in groups if each.is_paged])).to(
            self.device
        )

    def _cross_batch(self, num_seqs: int, rows: torch.Tensor | None) -> CrossBatch:
        """Cross-attention to these rows, which lie in the cache from its first block on, or to nothing."""
        count = 0 if rows is None else len(rows)
        lens = torch.full((num_seqs,), count, dtype=torch.int32, device=self.device)
        table = torch.arange(self._blocks_for(max(count, 1)), dtype=torch.int32, device=self.device).expand(
            num_seqs, -1
        )
        slots = torch.arange(count, device=self.device)
        return CrossBatch(lens, (count,) * num_seqs, count, table.expand(num_seqs, -1), slots)

    def _state_rows(self, groups: Sequence[CacheGroup], starts: Sequence[int]) -> torch.Tensor:
        """Each sequence's own row, read from where it goes on."""
        own = list(range(len(starts)))
        read = [row if start else zero_row(groups[-1]) for row, start in zip(own, starts, strict=True)]
        return torch.tensor([read, own], device=self.device)
