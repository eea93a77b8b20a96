"""Allocates the KV cache: how many blocks fit, and the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sensorium.attention import Attention
from sensorium.config import CacheConfig, SchedulerConfig
from sensorium.errors import ConfigError

DEFAULT_CPU_BYTES = 4 << 30
"""The cache takes at most this on a CPU by default. Pages are touched only as they are used, but in time all are."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Sizes of one attention layer's cache."""

    num_kv_heads: int
    head_size: int

    def block_bytes(self, block_size: int, itemsize: int) -> int:
        """Bytes of one block's keys and values in this layer."""
        return 2 * block_size * self.num_kv_heads * self.head_size * itemsize


def layer_shapes(layers: Sequence[Attention]) -> list[LayerShape]:
    """Cache sizes of a model's attention layers, in the order in which `kv_caches` has them."""
    return [LayerShape(layer.num_kv_heads, layer.head_size) for layer in layers]


def decide_num_blocks(
    shapes: Sequence[LayerShape],
    dtype: torch.dtype,
    cache: CacheConfig,
    scheduler: SchedulerConfig,
    max_model_len: int,
    available_bytes: int,
) -> int:
    """Number of KV blocks: as asked for, or as many as fit and can be of use.

    Args:
        shapes: One entry per attention layer.
        dtype: Of keys and values.
        cache: Its `num_blocks` or `kv_cache_bytes` decide if given.
        scheduler: More blocks than `max_num_seqs` full-length requests need are of no use but to the prefix cache,
            for which twice that is allowed.
        max_model_len: Longest request.
        available_bytes: Memory left for the cache.

    Raises:
        ConfigError: Not even one block fits.
    """
    if cache.num_blocks is not None:
        return cache.num_blocks
    block_bytes = sum(shape.block_bytes(cache.block_size, dtype.itemsize) for shape in shapes)
    if block_bytes == 0:
        return 1
    useful = 2 * scheduler.max_num_seqs * -(-max_model_len // cache.block_size)
    budget = available_bytes if cache.kv_cache_bytes is None else cache.kv_cache_bytes
    num_blocks = min(budget // block_bytes, useful)
    if num_blocks < 1:
        raise ConfigError(
            f"KV cache: got {budget} bytes, expected at least {block_bytes} for one block. "
            "Raise kv_cache_bytes or memory_fraction, or choose a smaller model."
        )
    return int(num_blocks)


def allocate(
    shapes: Sequence[LayerShape], num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """Per layer a zeroed tensor `(2, num_blocks, block_size, num_kv_heads, head_size)`.

    Raises `ConfigError` if they don't fit into memory.
    """
    try:
        return [
            _zeros((2, num_blocks, block_size, shape.num_kv_heads, shape.head_size), dtype, device) for shape in shapes
        ]
    except (MemoryError, ValueError, RuntimeError) as error:  # of numpy, of numpy for absurd sizes, and of torch
        size = num_blocks * sum(shape.block_bytes(block_size, dtype.itemsize) for shape in shapes)
        raise ConfigError(
            f"KV cache: got {num_blocks} blocks of {block_size} tokens, which take {size} bytes, expected what the "
            "device has room for. Lower num_blocks (--num-blocks) or kv_cache_bytes (--kv-cache-bytes)."
        ) from error


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # Zero pages from the system cost nothing until they are written to, unlike torch.zeros, which writes them.
    pages = np.zeros(shape, dtype=np.dtype(f"u{dtype.itemsize}"))
    return torch.from_numpy(pages.view(np.dtype(f"i{dtype.itemsize}"))).view(dtype)
