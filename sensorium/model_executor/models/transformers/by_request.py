"""The slow way, for any model that `generate` can run: a separate pass for each request, with Hugging Face's cache.

The engine treats such a cache as a state of fixed size: a chunk reads it from one row and writes the new one into
another. So requests are scheduled, preempted and repeated like all others, and a prefix is a hit where a state was
kept.

For a model without a cache, or with one that is wrong if a prompt is divided into chunks, the tokens themselves are
kept, and every pass runs all of them.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import nn

from sensorium.attention import AttentionMetadata, LayerCache
from sensorium.cache_spec import CacheSpec, StateSpec, StateTensor
from sensorium.model_executor.drivers import MediaRows
from sensorium.model_executor.models.transformers.media_rows import TrunkInputs
from sensorium.model_executor.models.transformers.trunk import Trunk, hidden_states

_CACHE_NAMES = ("past_key_values", "cache_params", "state")
"""Models' names of their cache, as an argument and in their output."""
_REPLACED = ("keys", "values")
"""Tensors of a cache's layer that are replaced when they grow, never written."""


class RequestStates(nn.Module):
    """Each request's cache, by the row of the state group. The worker treats this module as a layer with a state."""

    def __init__(self) -> None:
        super().__init__()
        self.group_index = 0
        self._caches: dict[int, Any] = {}
        self._base = self._slope = 0.0
        """A cache's size in bytes: a constant, and an increase per token."""

    def cache_spec(self) -> CacheSpec:
        """A state of a few bytes; the caches that rows stand for are in this module."""
        return StateSpec((StateTensor((1,), "float32"),))

    def read(self, row: int) -> Any:
        """A cache that may be written into."""
        return fork(self._caches[row])

    def write(self, row: int, cache: Any) -> None:
        """Keep a cache."""
        self._caches[row] = cache

    def clear(self) -> None:
        """Forget everything."""
        self._caches.clear()

    def measure(self, lengths: Sequence[int]) -> None:
        """Estimate the memory of caches from those of sequences of these lengths, by row."""
        sizes = {length: _num_bytes(self._caches[row]) for row, length in enumerate(lengths) if row in self._caches}
        if len(sizes) > 1:
            (short, least), (long, most) = min(sizes.items()), max(sizes.items())
            self._slope = max((most - least) / (long - short), 0.0)
            self._base = max(least - self._slope * short, 0.0)

    def bytes_of(self, num_tokens: int) -> int:
        """Memory of the cache of a sequence, by `measure`; 0 without it."""
        return int(self._base + self._slope * num_tokens)


class Pace(Enum):
    """How a sequence goes on."""

    CHUNKS = "chunks"
    """With any number of tokens, from its cache."""
    TOKENS = "tokens"
    """By one token at a time: some mixers can't continue with more."""
    WHOLE = "whole"
    """Recomputed from its first token."""


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Tokens of one request, from its position `start` on."""

    start: int
    ids: torch.Tensor
    """`(num_tokens,)`"""
    positions: torch.Tensor
    """`(num_tokens,)`, or `(3, num_tokens)` with M-RoPE."""
    rows: torch.Tensor | None = None
    """`(num_tokens, hidden_size)`, embedded, media in their places; None: the model embeds ids itself."""
    media: MediaRows | None = None

    def part(self, begin: int, end: int) -> Chunk:
        """Its tokens `[begin, end)`."""
        return Chunk(
            self.start + begin,
            self.ids[begin:end],
            self.positions[..., begin:end],
            None if self.rows is None else self.rows[begin:end],
            None if self.media is None else self.media.part(begin, end),
        )

    def behind(self, ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor | None) -> Chunk:
        """This chunk with all earlier tokens, which are given, before it."""
        return Chunk(
            0,
            torch.cat((ids, self.ids)),
            torch.cat((positions, self.positions), -1),
            None if rows is None or self.rows is None else torch.cat((rows, self.rows)),
        )


class ByRequestWay(nn.Module):
    """Runs a model request by request.

    Args:
        model: Of transformers, untouched.
        trunk: Of the same model; None if it has none: then logits take the place of hidden states.
        pace: How a sequence goes on.
        inputs: Makes the trunk's arguments if it takes embedded rows; None: the outer model runs on token ids.
    """

    def __init__(self, model: nn.Module, trunk: Trunk | None, *, pace: Pace, inputs: TrunkInputs | None = None) -> None:
        super().__init__()
        self._inputs = inputs
        self._model = (model,)  # in a tuple, so that it is no submodule: its parameters belong to the whole model
        self.trunk = trunk
        self._pace = pace
        names = inspect.signature(model.forward if inputs is None or trunk is None else trunk.forward).parameters
        self._takes_positions = "position_ids" in names
        self._takes_mask = "attention_mask" in names
        self._cache_name = next((name for name in _CACHE_NAMES if name in names), None)
        self.states = RequestStates()

    @property
    def described(self) -> str:
        """For the load report."""
        if self._pace is Pace.WHOLE:
            return "a pass for each request over all of its tokens, without a cache"
        return "a pass for each request, with Hugging Face's cache"

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: Sequence[LayerCache],
        attn_metadata: AttentionMetadata,
        media: MediaRows | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states `(num_tokens, hidden_size)`, or logits in their place.

        `inputs_embeds`: the rows of these tokens, media in their places, if they were made before.
        """
        batch = attn_metadata.of_group(self.states.group_index)
        lens = list(zip(batch.query_lens_host, batch.seq_lens_host, strict=True))
        rows = [(None, None)] * len(lens) if batch.state_rows is None else batch.state_rows.T.tolist()
        if self._inputs is not None and inputs_embeds is None:
            inputs_embeds = self._inputs.embed(input_ids, media)
        step = Chunk(0, input_ids, positions, inputs_embeds, media)
        parts, begin = [], 0
        for (num_tokens, end), (read, write) in zip(lens, rows, strict=True):
            start = end - num_tokens
            chunk = replace(step.part(begin, begin + num_tokens), start=start)
            hidden, cache = self._run(chunk, None if start == 0 or read is None else self.states.read(read))
            parts.append(hidden)
            begin += num_tokens
            if write is not None:
                self.states.write(write, cache)
        return torch.cat(parts)

    def _run(self, chunk: Chunk, cache: Any) -> tuple[torch.Tensor, Any]:
        if self._pace is Pace.WHOLE:
            whole = chunk if cache is None else chunk.behind(*cache)
            hidden, _ = self._pass(whole, None)
            return hidden[chunk.start :], (whole.ids, whole.positions, whole.rows)
        if chunk.start == 0 or self._pace is Pace.CHUNKS:
            return self._pass(chunk, cache)
        parts = []
        for i in range(len(chunk.ids)):
            hidden, cache = self._pass(chunk.part(i, i + 1), cache)
            parts.append(hidden)
        return torch.cat(parts), cache

    def _pass(self, chunk: Chunk, cache: Any) -> tuple[torch.Tensor, Any]:
        given = self._arguments(chunk)
        if self._takes_mask and chunk.start == 0:  # later chunks have no padding, and mixers misread a longer mask
            given["attention_mask"] = chunk.ids.new_ones(1, len(chunk.ids))
        if self._cache_name is not None and cache is not None:
            given[self._cache_name] = cache
        if self.trunk is None:
            output = self._model[0](**given)
            return output.logits[0], cache_in(output)
        output = self.trunk.run(given) if chunk.rows is None else self.trunk.forward(**given)
        return hidden_states(output)[0], cache_in(output)

    def _arguments(self, chunk: Chunk) -> dict[str, Any]:
        """A pass's arguments other than mask and cache."""
        num_tokens, uses_cache = len(chunk.ids), self._pace is not Pace.WHOLE
        if self._inputs is None:
            given: dict[str, Any] = {"input_ids": chunk.ids[None], "use_cache": uses_cache}
            positions = torch.arange(chunk.start, chunk.start + num_tokens, device=chunk.ids.device)
        else:
            assert chunk.rows is not None
            given = {"inputs_embeds": chunk.rows[None], "use_cache": uses_cache}
            given |= self._inputs.arguments(chunk.ids, chunk.media)
            positions = chunk.positions
        if self._takes_positions:
            given["position_ids"] = positions[None] if positions.dim() == 1 else positions[:, None]
        return given


def cache_in(output: Mapping[str, Any]) -> Any:
    """The cache among what a model returned; None without one."""
    return next((output[name] for name in _CACHE_NAMES if output.get(name) is not None), None)


def _num_bytes(cache: Any) -> int:
    """Memory of a cache's tensors; shared memory counts once."""
    storages: dict[int, int] = {}
    _collect_storages(cache, storages)
    return sum(storages.values())


def _collect_storages(value: Any, storages: dict[int, int]) -> None:
    """Sizes of the storages behind the tensors of a cache, by address."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    elif isinstance(value, list | tuple):
        for each in value:
            _collect_storages(each, storages)
    elif isinstance(value, dict):
        _collect_storages(list(value.values()), storages)
    elif "Cache" in type(value).__name__ or type(value).__name__.endswith("Layer"):
        _collect_storages(vars(value), storages)


def fork(cache: Any) -> Any:
    """A copy of a cache that can be written into. It shares tensors that are only ever replaced."""
    from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

    if isinstance(cache, torch.Tensor):
        return cache.clone()
    if isinstance(cache, list | tuple):
        return type(cache)(fork(each) for each in cache)
    if isinstance(cache, dict):
        return {name: fork(each) for name, each in cache.items()}
    if not isinstance(cache, Cache | CacheLayerMixin | LinearAttentionCacheLayerMixin):
        return copy.deepcopy(cache) if type(cache).__name__.endswith("Cache") else cache
    forked = copy.copy(cache)
    for name, value in vars(cache).items():
        if name not in _REPLACED:
            setattr(forked, name, fork(value))
    return forked
