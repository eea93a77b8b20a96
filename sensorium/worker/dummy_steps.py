"""Steps over prompts of no request: what a model is run with at load, in a small cache of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sensorium.attention import AttentionMetadata, compute_slot_mapping
from sensorium.config import EngineConfig
from sensorium.model_executor.drivers import MediaRows, StepInputs
from sensorium.worker import kv_cache
from sensorium.worker.kv_cache import LayerShape

IdArray = npt.NDArray[np.int64]


class DummySteps:
    """Makes steps as the model runner would, for sequences that lie in a cache from its first block on."""

    def __init__(self, config: EngineConfig, shapes: Sequence[LayerShape], device: torch.device) -> None:
        self.device = device
        self.dtype = config.model_config.dtype
        self._shapes = shapes
        self._block_size = config.cache_config.block_size
        self._uses_mrope = config.model_config.uses_mrope

    def caches(self, num_tokens: int, num_sequences: int = 1) -> list[torch.Tensor]:
        """KV caches that hold so many sequences of so many tokens."""
        num_blocks = num_sequences * self._blocks_for(num_tokens)
        return kv_cache.allocate(self._shapes, num_blocks, self._block_size, self.dtype, self.device)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def step(
        self,
        pieces: Sequence[tuple[IdArray, int, int]],
        caches: list[torch.Tensor],
        *,
        media: MediaRows | None = None,
        maps: Mapping[str, Any] | None = None,
    ) -> StepInputs:
        """One step of pieces `(token_ids, start, end)`: those tokens of each sequence, in the cache's order.

        `media`: rows of the batch. `maps`: for models that merge by `multi_modal_placeholder_index_maps`.
        """
        query_lens = np.array([end - start for _, start, end in pieces], dtype=np.int32)
        seq_lens = np.array([end for _, _, end in pieces], dtype=np.int32)
        num_blocks = max(self._blocks_for(len(ids)) for ids, _, _ in pieces)
        table = np.arange(num_blocks * len(pieces), dtype=np.int32).reshape(len(pieces), num_blocks)
        positions = np.concatenate([np.arange(start, end, dtype=np.int64) for _, start, end in pieces])
        if self._uses_mrope:
            positions = np.tile(positions, (3, 1))
        ids = np.concatenate([ids[start:end] for ids, start, end in pieces])
        return StepInputs(
            input_ids=torch.from_numpy(ids).to(self.device),
            positions=torch.from_numpy(positions).to(self.device),
            kv_caches=caches,
            attn_metadata=AttentionMetadata.from_numpy(
                query_lens,
                seq_lens,
                table,
                compute_slot_mapping(table, query_lens, seq_lens, self._block_size),
                device=self.device,
                multi_modal_placeholder_index_maps=maps,
            ),
            media=media,
        )
