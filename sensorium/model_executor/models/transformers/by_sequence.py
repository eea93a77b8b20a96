"""Runs the mixers of a flat batch one sequence at a time. Mixers are modules that keep data of a sequence themselves.

The rest of the trunk runs over all rows at once. The engine's caches have the data that a mixer keeps:

- a state of fixed size, in the rows of the state group. All sequences that continue by one token run together.
- keys and values of attention that a model computes itself, in blocks. The module gets all of its sequence so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from sensorium.attention import AttentionMetadata, LayerCache
from sensorium.cache_spec import CacheSpec, FullAttentionSpec, StateSpec, StateTensor
from sensorium.kernels import split_cache, write_kv
from sensorium.model_executor.models.transformers.interface import EAGER, IMPLEMENTATION, PassEnded, RuledMask
from sensorium.model_executor.models.transformers.mixers import (
    MADE_BY_SEQUENCE,
    FoundMixer,
    at,
    bound,
    with_layer,
    with_tensors,
)
from sensorium.model_executor.models.transformers.refusal import CannotRunError

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True, slots=True)
class SequenceRows:
    """A sequence's rows `[begin, end)` in a flat batch, from its position `start` on."""

    index: int
    begin: int
    end: int
    start: int

    @property
    def seq_len(self) -> int:
        """The sequence's length, these rows included."""
        return self.start + self.end - self.begin


@dataclass(frozen=True, slots=True, eq=False)
class MixedBatch:
    """What mixers need to know of a pass.

    Args:
        sequences: The sequences in the order of their rows, which are all rows of the pass. If empty, the pass ends at
            the first mixer.
        token_by_token: Whether sequences continue by one token at a time. Some mixers can't continue with more.
        caches: Each mixer's cache; empty in a pass that keeps nothing.
        metadata: The step's attention metadata.
    """

    sequences: tuple[SequenceRows, ...]
    token_by_token: bool = False
    caches: tuple[LayerCache, ...] = ()
    metadata: AttentionMetadata | None = None
    ended_with: dict[str, Any] = field(default_factory=dict)
    """The arguments of the mixer at which the pass ended."""

    @classmethod
    def of_step(cls, metadata: AttentionMetadata, caches: Sequence[LayerCache], token_by_token: bool) -> MixedBatch:
        """The batch of a step."""
        rows, begin = [], 0
        for i, (count, seq_len) in enumerate(zip(metadata.query_lens_host, metadata.seq_lens_host, strict=True)):
            if count:
                rows.append(SequenceRows(i, begin, begin + count, seq_len - count))
            begin += count
        return cls(tuple(rows), token_by_token, tuple(caches), metadata)


_batch: ContextVar[MixedBatch | None] = ContextVar("transformers_mixed_batch", default=None)


@contextmanager
def mixing(batch: MixedBatch) -> Iterator[None]:
    """While active, mixers called in this thread see the sequences of this batch."""
    token = _batch.set(batch)
    try:
        yield
    finally:
        _batch.reset(token)


class Mixer(nn.Module):
    """Replaces a module's `forward`; without a `MixedBatch` it calls the original. The worker treats it as a layer with
    a cache.

    Args:
        found: The module.
    """

    def __init__(self, found: FoundMixer) -> None:
        super().__init__()
        self.group_index = 0
        self.num_calls = 0
        """How often it was called; this is added to the number of attention calls."""
        self._found = (found,)  # no submodule: its parameters are the model's
        self.cache_index = 0
        """Its place in `MixedBatch.caches`."""
        self._of_keys: dict[str, torch.Tensor] = {}
        self.beside = nn.ModuleList(
            KeptBeside(tensor.shape[-1])
            for path, tensor in found.tensors
            if found.is_attention and len(tensor.shape) == 3
        )
        """What attention keeps of each token beside keys and values."""
        self._forward: Callable[..., Any] = found.module.forward
        self._goes_together = not found.is_attention and all(
            axis in (None, 1) for axes in (*found.axes.values(), found.output_axes) for axis in axes
        )
        found.module.forward = self._stand_in

    def remove(self) -> None:
        """Leave the module as it was."""
        self._found[0].module.forward = self._forward

    @property
    def takes_keys_only(self) -> bool:
        """Whether it takes arguments of keys alone, whose length is the sequence's, not the batch's."""
        return bool(self._found[0].keys_only)

    def take_of_keys(self, given: Mapping[str, Any]) -> None:
        """Store the arguments of keys alone, as given for the largest number of keys."""
        self._of_keys = {name: given[name] for name in self._found[0].keys_only}

    def cache_spec(self) -> CacheSpec:
        """The spec of what it keeps of a sequence. Raises `CannotRunError` for a dtype that states don't support."""
        tensors = [tensor for _, tensor in self._found[0].tensors]
        if self._found[0].is_attention:
            keys, values = (each for each in tensors if each.dim() == 4)
            return FullAttentionSpec(keys.shape[1], keys.shape[3], values.shape[3])
        if any(each.dtype not in _DTYPES for each in tensors):
            raise CannotRunError("a layer of it keeps a state that is no floating-point numbers")
        return StateSpec(tuple(StateTensor(tuple(each.shape[1:]), _DTYPES[each.dtype]) for each in tensors))

    def _stand_in(self, *args: Any, **kwargs: Any) -> Any:
        batch = _batch.get()
        if batch is None:
            return self._forward(*args, **kwargs)
        given = bound_to(self._forward, self._found[0].module, args, kwargs)
        if not batch.sequences:
            batch.ended_with.update(given)
            raise PassEnded
        self.num_calls += 1
        num_rows = batch.sequences[-1].end
        done: list[tuple[list[int], list[Any]]] = []
        tree: Any = None
        for sequences in self._together(batch):
            leaves, tree = tree_flatten(self._run(batch, sequences, given))
            done.append(([row for each in sequences for row in range(each.begin, each.end)], leaves))
        return tree_unflatten(_joined(done, self._found[0].output_axes, num_rows), tree)

    def _together(self, batch: MixedBatch) -> Iterator[list[SequenceRows]]:
        """Groups of sequences that run in one call: those that continue by one token if the module allows it, and every
        other one alone."""
        single = [each for each in batch.sequences if each.start > 0 and each.end - each.begin == 1]
        if self._goes_together and len(single) > 1:
            yield single
        else:
            single = []
        for each in batch.sequences:
            if each in single:
                continue
            if each.start > 0 and batch.token_by_token:
                rows = range(each.begin, each.end)
                yield from ([SequenceRows(each.index, row, row + 1, each.start + row - each.begin)] for row in rows)
            else:
                yield [each]

    def _run(self, batch: MixedBatch, sequences: list[SequenceRows], given: Mapping[str, Any]) -> Any:
        """Call the module for these sequences; its output has one row for each, or all rows of a single one."""
        found, first = self._found[0], sequences[0]
        own: dict[str, Any] = {}
        for name, value in given.items():
            if name in self._of_keys:
                own[name] = self._of_keys[name][..., : first.seq_len]
            elif name not in MADE_BY_SEQUENCE:
                own[name] = _cut(value, found.axes.get(name), sequences)
        if "use_cache" in given:
            own["use_cache"] = True
        if found.is_attention:
            if "attention_mask" in given:
                own["attention_mask"] = _mask(given["attention_mask"], first, _dtype_of(given), found.mask_values)
            layer = self._paged_layer(batch, first)
            own[found.cache_name] = with_layer(found.empty, found.place, layer)
            with _eager(found.module):
                output = self._forward(**own)
        else:
            if "attention_mask" in given:
                own["attention_mask"] = None
            layer = self._state_layer(batch, sequences)
            own[found.cache_name] = with_layer(found.empty, found.place, layer)
            output = self._forward(**own)
            self._keep(batch, sequences, layer)
        if len(sequences) == 1:
            return output
        leaves, tree = tree_flatten(output)
        axes = found.output_axes
        return tree_unflatten(
            [leaf if axis is None else leaf.transpose(0, 1) for leaf, axis in zip(leaves, axes, strict=True)], tree
        )

    # States

    def _state_layer(self, batch: MixedBatch, sequences: Sequence[SequenceRows]) -> Any:
        """The layer's cache with the states of these sequences, `(num_sequences, ...)`."""
        found = self._found[0]
        if sequences[0].start == 0:
            return with_tensors(at(found.empty, found.place), {})
        rows = self._rows(batch, sequences, 0 if self._is_first(batch, sequences[0]) else 1)
        states = {path: cached[rows] for (path, _), cached in zip(found.tensors, self._cache(batch), strict=True)}
        return with_tensors(found.kept, states)

    def _keep(self, batch: MixedBatch, sequences: Sequence[SequenceRows], layer: Any) -> None:
        if not batch.caches:
            return
        rows = self._rows(batch, sequences, 1)
        for (path, _), cached in zip(self._found[0].tensors, self._cache(batch), strict=True):
            cached[rows] = at(layer, path).to(cached.dtype)

    def _is_first(self, batch: MixedBatch, rows: SequenceRows) -> bool:
        """Whether these are a sequence's first rows in the step, rather than those after a token that ran alone."""
        return rows.begin == next(each.begin for each in batch.sequences if each.index == rows.index)

    def _rows(self, batch: MixedBatch, sequences: Sequence[SequenceRows], which: int) -> torch.Tensor:
        """Rows of the state group that these sequences read (0) or write (1)."""
        assert batch.metadata is not None
        state_rows = batch.metadata.of_group(self.group_index).state_rows
        assert state_rows is not None
        return state_rows[which, [each.index for each in sequences]]

    def _cache(self, batch: MixedBatch) -> tuple[torch.Tensor, ...]:
        kept = batch.caches[self.cache_index]
        assert isinstance(kept, tuple)
        return kept

    # Keys and values

    def _paged_layer(self, batch: MixedBatch, rows: SequenceRows) -> Any:
        if not batch.caches:
            return _paged_layer_class()(rows, None, None)
        spec = self.cache_spec()
        assert isinstance(spec, FullAttentionSpec)
        blocks = _Blocks.of(batch, rows, self, (spec.key_size, spec.value_size))
        beside = [_Blocks.of(batch, rows, each, (each.size, 0)) for each in self.beside if isinstance(each, KeptBeside)]
        return _paged_layer_class()(rows, blocks, beside[0] if beside else None)


class KeptBeside(nn.Module):
    """A vector that attention keeps of each token besides keys and values, such as the index of sparse attention."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.group_index = 0
        self.cache_index = 0

    def cache_spec(self) -> CacheSpec:
        """One head's keys, without values."""
        return FullAttentionSpec(1, self.size, 0)


@dataclass(frozen=True, slots=True, eq=False)
class _Blocks:
    """A sequence's part of a paged cache."""

    keys: torch.Tensor
    values: torch.Tensor
    blocks: torch.Tensor
    """The blocks of the sequence."""
    slots: torch.Tensor
    """The slots of the rows to be written."""
    seq_len: int

    @classmethod
    def of(cls, batch: MixedBatch, rows: SequenceRows, layer: Mixer | KeptBeside, sizes: tuple[int, int]) -> _Blocks:
        """The sequence's blocks in a layer with keys and values of these sizes."""
        assert batch.metadata is not None
        kept = batch.caches[layer.cache_index]
        assert isinstance(kept, torch.Tensor)
        keys, values = split_cache(kept, *sizes)
        group = batch.metadata.of_group(layer.group_index)
        blocks = group.block_table[rows.index, : -(-rows.seq_len // keys.shape[1])]
        return cls(keys, values, blocks, group.slot_mapping[rows.begin : rows.end], rows.seq_len)

    def write(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes `(num_rows, num_heads, size)`; returns the same of all tokens so far."""
        write_kv(key.contiguous(), value.contiguous(), self.keys, self.values, self.slots)
        found = [cached[self.blocks].flatten(0, 1)[: self.seq_len].to(key.dtype) for cached in (self.keys, self.values)]
        return found[0], found[1]


@contextmanager
def _eager(module: nn.Module) -> Iterator[None]:
    """Within this context, the module attends in plain torch. Some modules do more than select attention by the
    function's name."""
    config: Any = getattr(module, "config", None)
    name = getattr(config, IMPLEMENTATION, None)
    if name is None:
        yield
        return
    setattr(config, IMPLEMENTATION, EAGER)
    try:
        yield
    finally:
        setattr(config, IMPLEMENTATION, name)


def bound_to(
    forward: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """A call's arguments by the parameter names of the module's own `forward`."""
    stand_in, module.forward = module.forward, forward
    try:
        return bound(module, args, kwargs)
    finally:
        module.forward = stand_in


def _cut(value: Any, axes: Sequence[int | None] | None, sequences: Sequence[SequenceRows]) -> Any:
    """The part of an argument of a single sequence, or `(num_sequences, 1, ...)` for several."""
    leaves, tree = tree_flatten(value)
    if axes is None or len(axes) != len(leaves):
        if any(isinstance(leaf, torch.Tensor) for leaf in leaves):
            raise CannotRunError("a layer that keeps a state is called otherwise than at load")
        return value
    cut = []
    for leaf, axis in zip(leaves, axes, strict=True):
        if axis is None or not isinstance(leaf, torch.Tensor):
            cut.append(leaf)
        elif len(sequences) == 1:
            cut.append(leaf.narrow(axis, sequences[0].begin, sequences[0].end - sequences[0].begin))
        else:
            cut.append(leaf[:, [each.begin for each in sequences]].transpose(0, 1))
    return tree_unflatten(cut, tree)


def _joined(done: Sequence[tuple[list[int], list[Any]]], axes: Sequence[int | None], num_rows: int) -> list[Any]:
    """The outputs of all sequences, with rows in the order of the batch."""
    if len(done) == 1:
        return done[0][1]
    order = torch.tensor([row for rows, _ in done for row in rows]).argsort()
    assert len(order) == num_rows
    joined = []
    for i, axis in enumerate(axes):
        leaves = [leaves[i] for _, leaves in done]
        joined.append(
            leaves[-1] if axis is None else torch.cat(leaves, axis).index_select(axis, order.to(leaves[0].device))
        )
    return joined


def _dtype_of(given: Mapping[str, Any]) -> torch.dtype:
    tensors = (leaf for value in given.values() for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor))
    return next((each.dtype for each in tensors if each.is_floating_point()), torch.float32)


def _mask(
    given: torch.Tensor | None,
    rows: SequenceRows,
    dtype: torch.dtype,
    values: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor | None:
    """`(1, 1, num_rows, seq_len)`: what a sequence's rows see, with the values of the module's own masks."""
    if given is None:
        return None
    queries = torch.arange(rows.start, rows.seq_len, device=given.device)[:, None]
    keys = torch.arange(rows.seq_len, device=given.device)[None]
    zero = torch.zeros((), dtype=torch.long, device=given.device)
    is_seen = given.rule(zero, zero, queries, keys) if isinstance(given, RuledMask) else keys <= queries
    is_seen = is_seen.expand(len(queries), rows.seq_len)[None, None]
    if values is not None:
        return torch.where(is_seen, *values)
    zeros = torch.zeros(is_seen.shape, dtype=dtype, device=given.device)
    return zeros.masked_fill(~is_seen, torch.finfo(dtype).min)


@cache
def _paged_layer_class() -> type:
    from transformers.cache_utils import CacheLayerMixin

    class PagedLayer(CacheLayerMixin):  # type: ignore[misc]
        """A layer's cache with keys and values in blocks; with None it has only the new ones."""

        def __init__(self, rows: SequenceRows, blocks: _Blocks | None, beside: _Blocks | None) -> None:
            super().__init__()
            self._blocks = blocks
            self._beside = beside
            self._rows = rows
            self._length = rows.start

        def lazy_initialization(self, *_: object) -> None:
            """Nothing needs initialization."""

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """Writes `(1, num_kv_heads, num_tokens, size)`; returns the same of all tokens so far."""
            self._length = self._rows.seq_len
            if self._blocks is None:
                return key_states, value_states
            key, value = self._blocks.write(key_states[0].transpose(0, 1), value_states[0].transpose(0, 1))
            return key.transpose(0, 1)[None], value.transpose(0, 1)[None]

        def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
            """The same of `(1, num_tokens, size)`."""
            if self._beside is None:
                return indexer_key_states
            key = indexer_key_states[0][:, None]
            return self._beside.write(key, key[..., :0])[0][:, 0][None]

        def get_seq_length(self) -> int:
            """Tokens so far."""
            return self._length

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            """Keys, and the first one's position."""
            return self._length + query_length, 0

        def get_max_length(self) -> int:
            """Unbounded."""
            return -1

        get_max_cache_shape = get_max_length

    return PagedLayer
