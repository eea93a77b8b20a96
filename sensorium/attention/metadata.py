"""What one step's attention needs to know about its batch: lengths, block tables, slots.

The worker builds one `AttentionMetadata` per step and every attention layer of the model reads it. It owns no
memory: on the CPU its tensors are views of the arrays it was built from.

Layers that keep their past by different rules (a window, everything, a state) have block tables of their own: the cache
groups of `sensorium.cache_spec`. A layer takes its part by `of_group`; models pass the whole on and needn't know.

Worked example, block size 4. Sequence A decodes its 6th token from blocks (7, 2); sequence B is new and runs
the first 3 tokens of its prompt in block 5:

    query_lens_host  (1, 3)          seq_lens_host  (6, 3)
    cu_seqlens_q     [0, 1, 4]       seq_lens       [6, 3]
    block_table      [[7, 2],        slot_mapping   [2*4 + 1,  5*4 + 0, 5*4 + 1, 5*4 + 2]
                      [5, 0]]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from sensorium.cache_spec import CacheGroup, CacheKind

IntArray = npt.NDArray[np.integer[Any]]
LayerCache: TypeAlias = torch.Tensor | tuple[torch.Tensor, ...]
"""An entry of `kv_caches`: what one layer keeps, see `sensorium.worker.kv_cache`."""
NO_SLOT = -1
"""Slot of a token whose key and value are not to be written."""


@dataclass(frozen=True, slots=True, eq=False)
class CrossBatch:
    """A step's batch as layers of cross-attention see it: the rows of each sequence's media items are the keys."""

    seq_lens: torch.Tensor
    """`(num_seqs,)` int32: rows that each sequence's tokens of this step see, from the first on."""
    seq_lens_host: tuple[int, ...]
    max_seq_len: int
    block_table: torch.Tensor
    """`(num_seqs, max_blocks)` int32"""
    slot_mapping: torch.Tensor
    """`(num_rows,)` int64: where the rows go that are written in this step."""
    before: torch.Tensor | None = None
    """See `AttentionMetadata.before_items`."""


@dataclass(frozen=True, slots=True, eq=False)
class AttentionMetadata:
    """One step's batch as attention sees it. Sequences stand in any order; prefill chunks and decodes mix freely.

    Invariants: sequence `i` owns the rows `cu_seqlens_q[i]:cu_seqlens_q[i + 1]` of the flat batch, which are its last
    positions, so `seq_lens[i] >= query_lens[i]`; its first `seq_lens[i]` positions stand, in order, in the blocks
    `block_table[i]`. Rows of `block_table` are padded with any valid block id, and so are entries of which none of the
    sequence's rows sees a position: what such blocks hold may be another's, or not even numbers.
    """

    num_tokens: int
    num_seqs: int
    cu_seqlens_q: torch.Tensor
    """`(num_seqs + 1,)` int32: where each sequence's rows begin; the last entry is `num_tokens`."""
    seq_lens: torch.Tensor
    """`(num_seqs,)` int32: KV length of each sequence after this step."""
    block_table: torch.Tensor
    """`(num_seqs, max_blocks)` int32 block ids; zero columns when nothing is cached."""
    slot_mapping: torch.Tensor
    """`(num_tokens,)` int64: `block id * block_size + offset`, or `NO_SLOT`."""
    max_seqlen_q: int
    max_seq_len: int
    num_prefill_tokens: int
    """Tokens of sequences that run more than one token in this step."""
    num_decode_tokens: int
    """Tokens of sequences that run exactly one."""
    query_lens_host: tuple[int, ...]
    seq_lens_host: tuple[int, ...]
    has_decodes: bool = True
    """Whether a sequence may run exactly one token."""
    row_spans: torch.Tensor | None = None
    """`(2, num_tokens)` int32: first position, and last position + 1, of the span that a row's position belongs to and
    whose positions see one another both ways, beside what else the layer's rules let them see (`compute_row_spans`).
    Zeros for rows of none, or anything that ends before them; `None` where no row is in a span. A span's keys must all
    be cached, so a chunk of a prompt that reaches into a span must reach its end."""
    multi_modal_placeholder_index_maps: Mapping[str, Any] | None = None
    """Per modality, which embedding rows fill which rows of this batch; for models that merge by themselves."""
    is_recorded: bool = False
    """The pass is recorded, to be repeated for other lengths: those on the host can't be read."""
    state_rows: torch.Tensor | None = None
    """`(2, num_seqs)` int64, for a layer with a state: the rows of its tensors in which each sequence's state stands,
    and those into which the state after this step goes. None where nothing is kept."""
    before_items: torch.Tensor | None = None
    """`(num_seqs,)` int32, for a layer of cross-attention: 1 for sequences whose tokens of this step stand before the
    last token of an item's span, and see all of its rows; None where there are none."""
    groups: tuple[AttentionMetadata, ...] = ()
    """The batch as the layers of each cache group see it; empty where all see this one."""

    def of_group(self, index: int) -> AttentionMetadata:
        """The batch as the layers of a group see it."""
        return self.groups[index] if self.groups else self

    def with_groups(
        self,
        groups: Sequence[CacheGroup],
        block_tables: Sequence[torch.Tensor],
        slot_mapping: torch.Tensor,
        state_rows: torch.Tensor | None,
        row_spans: torch.Tensor | None = None,
        cross: CrossBatch | None = None,
    ) -> AttentionMetadata:
        """The same batch with the tables of each cache group. This batch itself has those of the first group.

        Args:
            groups: The model's. Those with blocks come first.
            block_tables: Of each group with blocks, `(num_seqs, max_blocks)`.
            slot_mapping: `(num groups with blocks, num_tokens)`.
            state_rows: `(2, num_seqs)` of the group with a state.
            row_spans: `(num groups with blocks, 2, num_tokens)`.
            cross: Of the group of cross-attention.
        """
        spans = [None] * len(groups) if row_spans is None else row_spans.unbind()
        if len(groups) == 1 and groups[0].keeps_positions:
            return self if row_spans is None else replace(self, row_spans=spans[0])
        parts = []
        for i, group in enumerate(groups):
            if group.kind is CacheKind.STATE:
                parts.append(replace(self, state_rows=state_rows))
            elif group.kind is CacheKind.CROSS:
                assert cross is not None
                parts.append(self._of_rows(cross))
            else:
                table, slots = block_tables[i], slot_mapping[i]
                parts.append(replace(self, block_table=table, slot_mapping=slots, row_spans=spans[i]))
        return replace(parts[0], groups=tuple(parts))

    def _of_rows(self, cross: CrossBatch) -> AttentionMetadata:
        """The same queries with the rows of media items for keys."""
        return replace(
            self,
            seq_lens=cross.seq_lens,
            seq_lens_host=cross.seq_lens_host,
            max_seq_len=cross.max_seq_len,
            block_table=cross.block_table,
            slot_mapping=cross.slot_mapping,
            before_items=cross.before,
            row_spans=None,
        )

    @property
    def query_start_loc(self) -> torch.Tensor:
        """The same as `cu_seqlens_q`, under the name that some models know."""
        return self.cu_seqlens_q

    @classmethod
    def from_numpy(
        cls,
        query_lens: IntArray,
        seq_lens: IntArray,
        block_table: IntArray,
        slot_mapping: IntArray,
        *,
        device: torch.device | str = "cpu",
        row_spans: IntArray | None = None,
        multi_modal_placeholder_index_maps: Mapping[str, Any] | None = None,
    ) -> AttentionMetadata:
        """Build from host arrays: `(num_seqs,)`, `(num_seqs,)`, `(num_seqs, max_blocks)`, `(num_tokens,)`, and, if
        there are spans, `(2, num_tokens)`.

        On the CPU arrays of the right dtype (int32; int64 for slots) are used in place: leave them unchanged
        until the step has ended. On other devices they are copied without waiting.
        """
        starts = np.zeros(len(query_lens) + 1, dtype=np.int32)
        np.cumsum(query_lens, out=starts[1:])
        return cls.of_step(
            query_lens,
            seq_lens,
            cu_seqlens_q=_to_tensor(starts, np.int32, device),
            seq_lens_on_device=_to_tensor(seq_lens, np.int32, device),
            block_table=_to_tensor(block_table, np.int32, device),
            slot_mapping=_to_tensor(slot_mapping, np.int64, device),
            row_spans=None if row_spans is None else _to_tensor(row_spans, np.int32, device),
            multi_modal_placeholder_index_maps=multi_modal_placeholder_index_maps,
        )

    @classmethod
    def of_step(
        cls,
        query_lens: IntArray,
        seq_lens: IntArray,
        *,
        cu_seqlens_q: torch.Tensor,
        seq_lens_on_device: torch.Tensor,
        block_table: torch.Tensor,
        slot_mapping: torch.Tensor,
        row_spans: torch.Tensor | None = None,
        multi_modal_placeholder_index_maps: Mapping[str, Any] | None = None,
    ) -> AttentionMetadata:
        """Build from the lengths on the host, both `(num_seqs,)`, and what lies on the device already."""
        query_lens_host = tuple(query_lens.tolist())
        seq_lens_host = tuple(seq_lens.tolist())
        num_tokens = sum(query_lens_host)
        num_decode_tokens = query_lens_host.count(1)
        return cls(
            num_tokens=num_tokens,
            num_seqs=len(query_lens_host),
            cu_seqlens_q=cu_seqlens_q,
            seq_lens=seq_lens_on_device,
            block_table=block_table,
            slot_mapping=slot_mapping,
            max_seqlen_q=max(query_lens_host, default=0),
            max_seq_len=max(seq_lens_host, default=0),
            num_prefill_tokens=num_tokens - num_decode_tokens,
            num_decode_tokens=num_decode_tokens,
            query_lens_host=query_lens_host,
            seq_lens_host=seq_lens_host,
            has_decodes=num_decode_tokens > 0,
            row_spans=row_spans,
            multi_modal_placeholder_index_maps=multi_modal_placeholder_index_maps,
        )

    @classmethod
    def without_cache(
        cls,
        query_lens: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        row_spans: IntArray | None = None,
        multi_modal_placeholder_index_maps: Mapping[str, Any] | None = None,
    ) -> AttentionMetadata:
        """A batch of whole sequences without a cache: profiling, pooling, whole-prompt passes."""
        lens = np.asarray(query_lens, dtype=np.int32)
        return cls.from_numpy(
            lens,
            lens,
            np.zeros((len(lens), 0), dtype=np.int32),
            np.full(int(lens.sum()), NO_SLOT, dtype=np.int64),
            device=device,
            row_spans=row_spans,
            multi_modal_placeholder_index_maps=multi_modal_placeholder_index_maps,
        )


def _to_tensor(array: IntArray, dtype: type[np.integer[Any]], device: torch.device | str) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=dtype))
    if device == "cpu" or (isinstance(device, torch.device) and device.type == "cpu"):
        return tensor
    # From pinned memory, so that the host does not wait for the copy.
    return tensor.pin_memory().to(device, non_blocking=True)


def compute_slot_mapping(
    block_table: IntArray, query_lens: IntArray, seq_lens: IntArray, block_size: int
) -> npt.NDArray[np.int64]:
    """Slots `(num_tokens,)` int64 of the last `query_lens[i]` positions of each sequence.

    Args:
        block_table: `(num_seqs, max_blocks)` block ids.
        query_lens: `(num_seqs,)` tokens that run in this step.
        seq_lens: `(num_seqs,)` KV lengths after this step.
        block_size: Tokens per block.
    """
    ends = np.cumsum(query_lens)
    rows = np.repeat(np.arange(len(query_lens)), query_lens)
    within = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - query_lens, query_lens)
    positions = within + np.repeat(seq_lens - query_lens, query_lens)
    blocks = block_table[rows, positions // block_size].astype(np.int64)
    slots: npt.NDArray[np.int64] = blocks * block_size + positions % block_size
    return slots


def compute_row_spans(
    spans: Sequence[Sequence[tuple[int, int]]], query_lens: IntArray, seq_lens: IntArray
) -> npt.NDArray[np.int32] | None:
    """`AttentionMetadata.row_spans` of the last `query_lens[i]` positions of each sequence; `None` if all were zeros.

    Worked example: sequence A runs its positions 2 to 5 and has a span from 3 to 6, sequence B decodes:

        compute_row_spans([[(3, 6)], []], [4, 1], [6, 9])    [[0, 3, 3, 3, 0],
                                                              [0, 6, 6, 6, 0]]

    Args:
        spans: Of each sequence, first position and last position + 1 of its spans, which don't overlap.
        query_lens: `(num_seqs,)` tokens that run in this step.
        seq_lens: `(num_seqs,)` KV lengths after this step.
    """
    if not any(spans):
        return None
    rows = np.zeros((2, int(np.sum(query_lens))), dtype=np.int32)
    ends = np.cumsum(query_lens)
    for i, own in enumerate(spans):
        first_row = int(ends[i] - query_lens[i])
        first_position = int(seq_lens[i] - query_lens[i])
        for begin, end in own:
            inside = slice(*(first_row + max(0, min(at - first_position, int(query_lens[i]))) for at in (begin, end)))
            rows[:, inside] = ((begin,), (end,))
    return rows if rows.any() else None
