"""What a device's memory is for, and how much is left for the KV cache."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sensorium.attention import AttentionMetadata
from sensorium.config import EngineConfig, ModelFeatures
from sensorium.errors import ModelError
from sensorium.logger import get_logger
from sensorium.model_executor.drivers import MediaEncoder, ModelDriver, StepInputs
from sensorium.model_executor.layers.sampler import LOGIT_SCRATCH_BYTES, PROMPT_ROWS_AT_ONCE
from sensorium.model_executor.layers.tower import RecordableTower, towers_of
from sensorium.worker.decode_graphs import graph_sizes
from sensorium.worker.dummy_media import NoDummyMediaError, make_dummy_media
from sensorium.worker.kv_cache import DEFAULT_CPU_BYTES, CacheLayout
from sensorium.worker.tower_graphs import MAX_GRAPHS, MAX_PATCHES
from sensorium.worker.trunk_graphs import trunk_sizes

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Where a device's memory goes, in bytes; what is left of the engine's share is the KV cache's."""

    available: int
    """For the KV cache."""
    activations: int = 0
    """Most that a step needs beside the weights: decoder or encoder, at their full budgets."""
    recorded_passes: int = 0
    """Most that CUDA graphs hold."""
    encoder_cache: int = 0
    """Most that rows of encoded media take."""
    token_counts: int = 0
    """Counts of tokens, for penalties."""

    def parts(self) -> dict[str, int]:
        """What the report lists beside the weights and the KV cache; uses of 0 bytes are left out."""
        named = {
            "activations (at most)": self.activations,
            "recorded passes (at most)": self.recorded_passes,
            "encoder cache (at most)": self.encoder_cache,
            "token counts": self.token_counts,
        }
        return {name: size for name, size in named.items() if size}


def plan_memory(
    device: torch.device,
    config: EngineConfig,
    model: nn.Module,
    driver: ModelDriver,
    layout: CacheLayout,
    features: ModelFeatures,
    *,
    records: bool,
) -> MemoryPlan:
    """Decide what the KV cache may take on this device. `records`: passes will be recorded.

    On a CPU: a share of what is free, at most `DEFAULT_CPU_BYTES`. On CUDA: the engine's share of the device, less the
    weights, what others use, and what steps, recorded passes and encoded media take at most. Steps at their full
    budgets are run here once, so that no step that is admitted later needs more.
    """
    model_config = config.model_config
    itemsize, hidden_size = model_config.dtype.itemsize, int(getattr(model_config.hf_text_config, "hidden_size", 0))
    holds_rows = model_config.is_multimodal_model and features.splits_media
    cached_rows = (config.cache_config.encoder_cache_rows or 0) if holds_rows else 0
    encoder_cache = cached_rows * (getattr(model, "mm_row_width", None) or hidden_size) * itemsize
    counts = config.scheduler_config.max_num_seqs * model_config.vocab_size * 4 * config.counts_tokens_on_device
    if device.type == "cpu":
        share = config.cache_config.memory_fraction / config.parallel_config.tensor_parallel_size
        available = min(int(free_cpu_bytes() * share) // 2, DEFAULT_CPU_BYTES)
        return MemoryPlan(available, encoder_cache=encoder_cache, token_counts=counts)
    at_rest = torch.cuda.memory_allocated(device)
    _run_full_step(device, config, driver, layout)
    towers = towers_of(model)
    for tower in towers:
        _run_full_tower(device, config, tower, features)
    if isinstance(driver, MediaEncoder) and not towers:
        _run_dummy_media(config, driver, features)
    torch.cuda.synchronize(device)
    # Since the model was loaded: what it was tried on counts too, such as a plug-in's dummy media.
    activations = torch.cuda.max_memory_allocated(device) - at_rest + _logits_bytes(config)
    recorded = activations + _recorded_bytes(config, model, hidden_size, itemsize) if records else 0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    used_by_others = total - free - torch.cuda.memory_reserved(device)
    budget = int(total * config.cache_config.memory_fraction)
    taken = at_rest + used_by_others + activations + recorded + encoder_cache + counts
    return MemoryPlan(max(budget - taken, 0), activations, recorded, encoder_cache, counts)


def _logits_bytes(config: EngineConfig) -> int:
    """Logits of all requests, or of the rows of a prompt that are taken together: as the head gives them, and what
    sampling and log probabilities make of them."""
    num_rows = max(config.max_sampled_rows, PROMPT_ROWS_AT_ONCE)
    return num_rows * config.model_config.vocab_size * (config.model_config.dtype.itemsize + LOGIT_SCRATCH_BYTES)


def _recorded_bytes(config: EngineConfig, model: nn.Module, hidden_size: int, itemsize: int) -> int:
    """What recorded passes of every size keep for themselves. What they compute in between, they share."""
    decodes = sum(graph_sizes(config.scheduler_config.max_num_seqs)) * config.model_config.vocab_size * itemsize
    mixed = 2 * sum(trunk_sizes()) * hidden_size * itemsize
    towers = (
        MAX_GRAPHS
        * MAX_PATCHES
        * sum((tower.patch_width + hidden_size // tower.merge_size**2) * itemsize for tower in towers_of(model))
    )
    return decodes + mixed + towers


def free_cpu_bytes() -> int:
    """Memory that can be had without swapping."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 8 << 30  # no such file outside Linux: assume a small machine


def keep_freed_memory() -> bool:
    """Let this process keep what its tensors free, up to some hundred MiB, for the next ones; returns whether it can.

    A step's intermediate results are as large as the pieces that the C library takes from the system and gives back
    one by one, and the system clears every page of them anew: a sixth of the time of an image's prefill.
    """
    return _set_thresholds(mmap_bytes=32 << 20, trim_bytes=512 << 20)


def give_back_freed_memory() -> None:
    """Set the C library's bounds back, and give free memory back to the system.

    These are the bounds that it comes to by itself where large pieces are freed; it begins with lower ones.
    """
    if _set_thresholds(mmap_bytes=32 << 20, trim_bytes=64 << 20):
        ctypes.CDLL(None).malloc_trim(0)


def _set_thresholds(*, mmap_bytes: int, trim_bytes: int) -> bool:
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # not every C library has it
        return False
    trim_threshold, mmap_threshold = -1, -3
    return bool(mallopt(mmap_threshold, mmap_bytes)) and bool(mallopt(trim_threshold, trim_bytes))


def _run_full_step(device: torch.device, config: EngineConfig, driver: ModelDriver, layout: CacheLayout) -> None:
    """One step of `max_num_batched_tokens` text rows in one sequence, without a cache."""
    num_tokens = min(config.scheduler_config.max_num_batched_tokens, config.model_config.max_model_len)
    positions = np.arange(num_tokens, dtype=np.int64)
    if config.model_config.uses_mrope:
        positions = np.tile(positions, (3, 1))
    driver.forward(
        StepInputs(
            input_ids=torch.zeros(num_tokens, dtype=torch.int64, device=device),
            positions=torch.from_numpy(positions).to(device),
            kv_caches=layout.empty(device),
            attn_metadata=AttentionMetadata.without_cache([num_tokens], device=device),
        )
    )


def _run_full_tower(
    device: torch.device, config: EngineConfig, tower: RecordableTower, features: ModelFeatures
) -> None:
    """A tower's pass over as many rows as a step may encode, or over the largest item if that has more."""
    # More than one request's: a step encodes items of several, however short each must be.
    num_rows = max(config.scheduler_config.max_num_encoder_rows, *features.max_item_rows.values())
    side = isqrt(num_rows - 1) + 1
    grid = (1, tower.merge_size * side, tower.merge_size * side)
    pixels = torch.zeros(grid[1] * grid[2], tower.patch_width, dtype=config.model_config.dtype, device=device)
    tower(pixels, [grid])


def _run_dummy_media(config: EngineConfig, driver: MediaEncoder, features: ModelFeatures) -> None:
    """The encoder over as many of the model's dummy items, which are its largest, as a step may encode."""
    try:
        dummy = make_dummy_media(config)
    except (NoDummyMediaError, ModelError) as error:
        logger.warning("memory of the encoder is not accounted for: %s", error)
        return
    for modality, items in dummy.items.items():
        rows_each = max(features.max_item_rows.get(modality, 1), 1)
        count = max(config.scheduler_config.max_num_encoder_rows // rows_each, 1) if driver.batchable else 1
        driver.call_encoder(driver.encoder_kwargs([items[0]] * count))


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers; a shared tensor counts once."""
    return sum(storage.nbytes() for storage in _storages(model))


def _storages(model: nn.Module) -> Iterable[torch.UntypedStorage]:
    tensors = [*model.parameters(), *model.buffers()]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}.values()
