"""The slow way, for any model that `generate` can run: a pass of its own for each request, with Hugging Face's cache.

To the engine such a cache is a state of fixed size: a chunk reads the one in a row and writes its own into another. So
requests are scheduled, preempted and repeated like all others, and prefixes are found again where a state was kept.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sensorium.attention import AttentionMetadata, LayerCache
from sensorium.cache_spec import CacheSpec, StateSpec, StateTensor
from sensorium.model_executor.models.transformers.trunk import Trunk, hidden_states

_CACHE_NAMES = ("past_key_values", "cache_params", "state")
"""What models call their cache, as an argument and in what they return."""
_REPLACED = ("keys", "values")
"""Tensors of a cache's layer that are replaced when they grow, never written."""


class RequestStates(nn.Module):
    """What is kept of each request, by the row of the state group. To the worker it is a layer with a state."""

    def __init__(self) -> None:
        super().__init__()
        self.group_index = 0
        self._caches: dict[int, Any] = {}

    def cache_spec(self) -> CacheSpec:
        """A state of a few bytes; what rows stand for lies here."""
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


class ByRequestWay(nn.Module):
    """Runs a model request by request.

    Args:
        model: Of transformers, untouched.
        trunk: Of the same model; None where it has none, so that what stands for hidden states are logits.
        token_by_token: Whether a sequence goes on with one token at a time. Some mixers can't go on with more.
    """

    def __init__(self, model: nn.Module, trunk: Trunk | None, *, token_by_token: bool) -> None:
        super().__init__()
        self._model = (model,)  # no submodule: its parameters are the whole's
        self.trunk = trunk
        self._token_by_token = token_by_token
        names = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in names
        self._takes_mask = "attention_mask" in names
        self._cache_name = next((name for name in _CACHE_NAMES if name in names), None)
        self.states = RequestStates()

    @property
    def described(self) -> str:
        """For the load report."""
        return "a pass for each request, with Hugging Face's cache"

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: Sequence[LayerCache],
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Hidden states `(num_tokens, hidden_size)`, or logits in their place."""
        batch = attn_metadata.of_group(self.states.group_index)
        lens = list(zip(batch.query_lens_host, batch.seq_lens_host, strict=True))
        rows = [(None, None)] * len(lens) if batch.state_rows is None else batch.state_rows.T.tolist()
        parts, begin = [], 0
        for (num_tokens, end), (read, write) in zip(lens, rows, strict=True):
            ids = input_ids[begin : begin + num_tokens]
            start = end - num_tokens
            hidden, cache = self._run(ids, start, None if start == 0 or read is None else self.states.read(read))
            parts.append(hidden)
            begin += num_tokens
            if write is not None:
                self.states.write(write, cache)
        return torch.cat(parts)

    def _run(self, ids: torch.Tensor, start: int, cache: Any) -> tuple[torch.Tensor, Any]:
        if start == 0 or not self._token_by_token:
            return self._pass(ids, start, cache)
        parts = []
        for i in range(len(ids)):
            hidden, cache = self._pass(ids[i : i + 1], start + i, cache)
            parts.append(hidden)
        return torch.cat(parts), cache

    def _pass(self, ids: torch.Tensor, start: int, cache: Any) -> tuple[torch.Tensor, Any]:
        end = start + len(ids)
        given: dict[str, Any] = {"input_ids": ids[None], "use_cache": True}
        if self._takes_mask and start == 0:  # later nothing is padding either, and mixers misread a longer mask
            given["attention_mask"] = ids.new_ones(1, end)
        if self._takes_positions:
            given["position_ids"] = torch.arange(start, end, device=ids.device)[None]
        if self._cache_name is not None and cache is not None:
            given[self._cache_name] = cache
        if self.trunk is None:
            output = self._model[0](**given)
            return output.logits[0], _cache_in(output)
        output = self.trunk.run(given)
        return hidden_states(output)[0], _cache_in(output)


def _cache_in(output: Mapping[str, Any]) -> Any:
    return next((output[name] for name in _CACHE_NAMES if output.get(name) is not None), None)


def fork(cache: Any) -> Any:
    """A cache that can be written into while the first stays as it is. What is only ever replaced is shared."""
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
