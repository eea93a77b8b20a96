"""What a model's layers keep between steps: finds their declarations, groups them, decides how much fits, allocates.

Every module with a method `cache_spec()` is a layer with a cache; `kv_caches` has an entry for each, in module order:

- of attention, `(2, num_blocks, block_size, num_kv_heads, head_size)`, keys first; where values are not as large as
  keys, `(num_blocks, block_size, num_kv_heads, key_size + value_size)`, a head's key before its value;
- of a state, a tuple of tensors `(num_rows + 2, *shape)`. Row `num_rows` is zeros, from which a sequence begins, and is
  never written; row `num_rows + 1` is never read: rows of a recorded pass that stand for nobody write it;
- of a layer that shares another's cache, that layer's entry.

How memory is split: each group has a pool of its own. All groups that keep everything have `num_blocks` blocks, and so
has a group with a reach (a window or chunk), but no more than can be of use to it: what the requests that run at once
hold within their reach beside the tokens of steps in flight, and the same again for prefix hits. The number is as large
as the budget allows. A state group has two rows per request that may run, one to read and one to write, and one more
for snapshots. A group of cross-attention has as many blocks as those that keep everything, or as many as the items of
the requests need that are long enough to fill these, and at least as many as one request's items need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from sensorium.attention import Attention, LayerCache
from sensorium.cache_spec import (
    CacheGroup,
    CacheKind,
    CacheSpec,
    CrossAttentionSpec,
    OwnCacheSpec,
    SharedCacheSpec,
    SpanRule,
    StateSpec,
)
from sensorium.config import EngineConfig, ModelFeatures
from sensorium.errors import ConfigError, ModelError
from sensorium.model_executor.models.interfaces import supports_cross_attention

DEFAULT_CPU_BYTES = 4 << 30
"""The cache takes at most this on a CPU by default. Pages are touched only as they are used, but in time all are."""
_CACHE_DTYPES = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
_KINDS = list(CacheKind)
"""In the order in which groups stand."""


@dataclass(frozen=True, slots=True, eq=False)
class CacheLayer:
    """One layer with a cache."""

    name: str
    module: nn.Module
    owner: str
    """Name of the layer whose cache it reads: its own, unless it shares another's."""
    spec: OwnCacheSpec
    """The owner's."""
    group: int
    """The group's place among the model's groups."""


class CacheLayout:
    """The layers of one model that have caches, and the groups that they form."""

    def __init__(self, layers: Sequence[CacheLayer], config: EngineConfig) -> None:
        self.layers = tuple(layers)
        self._dtype = config.model_config.dtype
        self.cache_dtype = _CACHE_DTYPES.get(config.cache_config.cache_dtype, self._dtype)
        """Of cached keys and values."""
        self._block_size = config.cache_config.block_size
        rules = {layer.group: _rule(layer.spec) for layer in layers}
        self._rules = [rules[index] for index in sorted(rules)]

    @property
    def kinds(self) -> list[CacheKind]:
        """Of the groups."""
        return [kind for kind, _, _ in self._rules]

    @classmethod
    def of(cls, model: nn.Module, config: EngineConfig) -> CacheLayout:
        """Ask a model's layers, and tell each its group (`group_index`).

        Raises:
            ModelError: No layer has a cache, or one shares that of a layer that isn't there.
        """
        found = {name: (module, _declared(module)) for name, module in model.named_modules()}
        specs = {name: spec for name, (_, spec) in found.items() if spec is not None}
        if not specs:
            raise ModelError(
                f"{type(model).__name__}: got no layer with a cache, expected at least one "
                "sensorium.attention.Attention, or another module with a method cache_spec(). The engine keeps the KV "
                "cache, so attention must be its own layer."
            )
        if not supports_cross_attention(model) and any(isinstance(each, CrossAttentionSpec) for each in specs.values()):
            raise ModelError(
                f"{type(model).__name__}: got a layer of cross-attention, expected none in a class without "
                "SupportsCrossAttention. Add that, so that the engine gives forward the rows of its encoder."
            )
        owners = {name: _owner(name, specs) for name in specs}
        own = {name: spec for name, spec in specs.items() if not isinstance(spec, SharedCacheSpec)}
        rules = list(dict.fromkeys(map(_rule, own.values())))
        rules.sort(key=lambda rule: _KINDS.index(rule[0]))
        layers = []
        for name in specs:
            spec = own[owners[name]]
            module = found[name][0]
            group = rules.index(_rule(spec))
            module.group_index = group
            layers.append(CacheLayer(name, module, owners[name], spec, group))
        return cls(layers, config)

    def groups(self, num_blocks: Sequence[int], max_cross_rows: int = 0) -> tuple[CacheGroup, ...]:
        """The groups with so many blocks, or rows, each. `max_cross_rows`: rows that one request's items have at most,
        which layers of cross-attention keep."""
        return tuple(
            CacheGroup(
                kind,
                count,
                self._block_size,
                reach,
                tuple(layer.name for layer in self._owners(index)),
                self._bytes(index, count),
                spans,
                max_cross_rows if kind is CacheKind.CROSS else 0,
            )
            for index, ((kind, reach, spans), count) in enumerate(zip(self._rules, num_blocks, strict=True))
        )

    def rounding_line(self) -> str:
        """What keys and values are rounded to, for the load report; empty where they are not.

        Raises:
            ConfigError: The cache was to have 8 bits, and there is no layer that would round.
        """
        if self.cache_dtype == self._dtype:
            return ""
        layers = [layer.module for layer in self.layers if isinstance(layer.module, Attention)]
        name = str(self.cache_dtype).removeprefix("torch.")
        if not layers:
            raise ConfigError(
                f"kv_cache_dtype: got {name} for a model without layers that keep keys and values in blocks, expected "
                "'auto'. Leave kv_cache_dtype out."
            )
        scaled = sum((layer.k_scale, layer.v_scale) != (1.0, 1.0) for layer in layers)
        scales = f"scales of the checkpoint in {scaled} of {len(layers)} layers" if scaled else "scales of 1"
        return f"keys and values in {name}, {scales}"

    def plan(self, config: EngineConfig, available_bytes: int, max_cross_rows: int = 0) -> tuple[CacheGroup, ...]:
        """The groups with as many blocks as were asked for, or as fit and can be of use.

        Args:
            config: Its `num_blocks` or `kv_cache_bytes` decide if given.
            available_bytes: Memory left for all caches.
            max_cross_rows: See `groups`.

        Raises:
            ConfigError: Not even one block, or the states of as many requests as may run at once, fit.
        """
        empty = self.groups([0] * len(self._rules), max_cross_rows)
        sizes = _Sizes(empty, [self._useful(group, config) for group in empty], config.model_config.max_model_len)
        if (asked := config.cache_config.num_blocks) is not None:
            return self._sized(asked, sizes)
        kv_bytes = config.cache_config.kv_cache_bytes
        budget = available_bytes if kv_bytes is None else kv_bytes
        least = sum(group.num_bytes for group in self._sized(1, sizes))
        if budget < least:
            raise ConfigError(
                f"KV cache: got {budget} bytes, expected at least {least} for one block"
                f"{self._rows_note(sizes)}{self._state_note(sizes)}. Raise kv_cache_bytes or memory_fraction, or "
                f"choose a smaller model"
                f"{', or lower max_num_seqs' if self._state_note(sizes) else ''}."
            )
        low, high = 1, sizes.most
        while low < high:
            middle = (low + high + 1) // 2
            if sum(group.num_bytes for group in self._sized(middle, sizes)) <= budget:
                low = middle
            else:
                high = middle - 1
        return self._sized(low, sizes)

    def _sized(self, num_blocks: int, sizes: _Sizes) -> tuple[CacheGroup, ...]:
        """The groups for one number of blocks."""
        return self.groups(sizes.counts(num_blocks), max((group.max_rows for group in sizes.groups), default=0))

    def _useful(self, group: CacheGroup, config: EngineConfig) -> int:
        """Blocks beyond which more are of no use to a group."""
        scheduler, max_model_len = config.scheduler_config, config.model_config.max_model_len
        num_seqs = scheduler.max_num_seqs
        if group.kind is CacheKind.STATE:
            return (3 if config.cache_config.enable_prefix_caching else 2) * num_seqs
        if group.kind is CacheKind.CROSS:
            return 2 * num_seqs * group.blocks_of_rows
        whole = num_seqs * -(-max_model_len // group.block_size)
        if group.reach is None:
            return 2 * whole
        step = (
            min(scheduler.max_num_batched_tokens, max_model_len) if scheduler.enable_chunked_prefill else max_model_len
        )
        num_steps = scheduler.max_steps_in_flight
        within = num_seqs * group.blocks_within_reach(num_steps) + num_steps * -(-step // group.block_size)
        return 2 * min(whole, within)

    def _rows_note(self, sizes: _Sizes) -> str:
        rows = [group for group in self._sized(1, sizes) if group.kind is CacheKind.CROSS]
        return f" and {rows[0].num_bytes} for the rows of one request's media" if rows else ""

    def _state_note(self, sizes: _Sizes) -> str:
        states = [group for group in self._sized(1, sizes) if not group.is_paged]
        size = sum(group.num_bytes for group in states)
        return f" beside {size} for {states[0].num_blocks} states" if states else ""

    def _owners(self, group: int) -> list[CacheLayer]:
        return [layer for layer in self.layers if layer.group == group and layer.owner == layer.name]

    def _bytes(self, group: int, count: int) -> int:
        is_state = self._rules[group][0] is CacheKind.STATE
        itemsize = self._dtype.itemsize if is_state else self.cache_dtype.itemsize
        block_bytes = sum(layer.spec.block_bytes(self._block_size, itemsize) for layer in self._owners(group))
        return (count + _NUM_RESERVED_ROWS * is_state) * block_bytes

    def allocate(
        self, groups: Sequence[CacheGroup], device: torch.device, dtype: torch.dtype | None = None
    ) -> list[LayerCache]:
        """The entries of `kv_caches`, zeroed. `dtype`: of keys and values, if not `cache_dtype`.

        Raises `ConfigError` if they don't fit into memory.
        """
        dtype = self.cache_dtype if dtype is None else dtype
        try:
            own = {
                layer.name: self._allocate_layer(layer.spec, groups[layer.group].num_blocks, device, dtype)
                for layer in self.layers
                if layer.owner == layer.name
            }
        except (MemoryError, ValueError, RuntimeError) as error:  # of numpy, of numpy for absurd sizes, and of torch
            size, most = sum(group.num_bytes for group in groups), max(group.num_blocks for group in groups)
            raise ConfigError(
                f"KV cache: got {most} blocks of {self._block_size} tokens, which take {size} bytes, expected what the "
                "device has room for. Lower num_blocks (--num-blocks) or kv_cache_bytes (--kv-cache-bytes)."
            ) from error
        return [own[layer.owner] for layer in self.layers]

    def empty(self, device: torch.device) -> list[LayerCache]:
        """Entries without room for anything, with which layers compute whole sequences and keep nothing."""
        nothing = torch.empty(0, dtype=self._dtype, device=device)
        return [
            (nothing,) * len(layer.spec.tensors) if isinstance(layer.spec, StateSpec) else nothing
            for layer in self.layers
        ]

    def _allocate_layer(self, spec: OwnCacheSpec, count: int, device: torch.device, dtype: torch.dtype) -> LayerCache:
        if isinstance(spec, StateSpec):
            return tuple(
                _zeros(
                    (count + _NUM_RESERVED_ROWS, *tensor.shape),
                    self._dtype if tensor.dtype_name is None else getattr(torch, tensor.dtype_name),
                    device,
                )
                for tensor in spec.tensors
            )
        shape = (count, self._block_size, spec.num_kv_heads)
        if spec.key_size == spec.value_size:
            return _zeros((2, *shape, spec.key_size), dtype, device)
        return _zeros((*shape, spec.key_size + spec.value_size), dtype, device)


@dataclass(frozen=True, slots=True, eq=False)
class _Sizes:
    """How the numbers of blocks of a model's groups depend on one another."""

    groups: Sequence[CacheGroup]
    useful: Sequence[int]
    """Of each group, blocks beyond which more are of no use."""
    max_model_len: int

    @property
    def most(self) -> int:
        """The number of blocks with which every group has all that it can use."""
        paged = [count for group, count in zip(self.groups, self.useful, strict=True) if group.keeps_positions]
        return max(paged, default=1)

    def counts(self, num_blocks: int) -> list[int]:
        """Of each group, where those that keep everything get `num_blocks`."""
        return [self._count(group, most, num_blocks) for group, most in zip(self.groups, self.useful, strict=True)]

    def _count(self, group: CacheGroup, most: int, num_blocks: int) -> int:
        if group.kind is CacheKind.STATE:
            return most
        if group.kind is CacheKind.CROSS:
            num_requests = -(-num_blocks * group.block_size // self.max_model_len)
            return min(max(num_blocks, num_requests * group.blocks_of_rows), most)
        return num_blocks if group.reach is None else min(num_blocks, most)


_NUM_RESERVED_ROWS = 2
"""Behind the rows of a state group: one of zeros, and one that nobody reads."""


def check_cache_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Raise `ConfigError` where a GPU can't turn floats into such a cache's and back."""
    if dtype == torch.float8_e4m3fn and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError(
            f"kv_cache_dtype on {torch.cuda.get_device_name(device)}: got 'fp8_e4m3', expected 'auto' or 'fp8_e5m2', "
            "since GPUs have e4m3 floats from compute capability 8.9 on. Change kv_cache_dtype."
        )


def max_rows_of_request(config: EngineConfig, features: ModelFeatures) -> int:
    """Rows that the items of one request have at most, as far as the model says."""
    limits = config.model_config.multimodal_config
    if limits is None:
        return 0
    return sum(rows * limits.limit_per_prompt.get(modality, 1) for modality, rows in features.max_item_rows.items())


def zero_row(group: CacheGroup) -> int:
    """The row of a state group from which a sequence begins."""
    return group.num_blocks


def unread_row(group: CacheGroup) -> int:
    """The row of a state group that takes what nobody reads."""
    return group.num_blocks + 1


def _rule(spec: OwnCacheSpec) -> tuple[CacheKind, int | None, SpanRule]:
    """Layers with equal ones form a group."""
    return spec.kind, spec.reach, spec.spans


def _declared(module: nn.Module) -> CacheSpec | None:
    declare = getattr(module, "cache_spec", None)
    spec = declare() if callable(declare) else None
    if spec is not None and not isinstance(spec, CacheSpec):
        raise ModelError(
            f"cache_spec() of {type(module).__name__}: got a {type(spec).__name__}, expected a spec of "
            "sensorium.cache_spec. Return what the layer keeps, or None."
        )
    return spec


def _owner(name: str, specs: dict[str, CacheSpec]) -> str:
    """The layer whose cache a layer reads."""
    spec, owner, seen = specs[name], name, {name}
    while isinstance(spec, SharedCacheSpec):
        owner = spec.layer
        if owner not in specs or owner in seen:
            own = [each for each in specs if not isinstance(specs[each], SharedCacheSpec)]
            raise ModelError(
                f"layer {name}: got {spec.layer!r} as the layer whose cache it shares, expected one of "
                f"{', '.join(own[:8]) or 'those with a cache'}. Name a layer with a cache of its own."
            )
        spec = specs[owner]
        seen.add(owner)
    return owner


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # Zero pages from the system cost nothing until they are written to, unlike torch.zeros, which writes them.
    pages = np.zeros(shape, dtype=np.dtype(f"u{dtype.itemsize}"))
    return torch.from_numpy(pages.view(np.dtype(f"i{dtype.itemsize}"))).view(dtype)
