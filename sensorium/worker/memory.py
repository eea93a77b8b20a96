"""How much memory a device has left for the KV cache."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sensorium.attention import AttentionMetadata
from sensorium.config import EngineConfig
from sensorium.model_executor.drivers import ModelDriver, StepInputs
from sensorium.worker.kv_cache import DEFAULT_CPU_BYTES, CacheLayout


def available_bytes(device: torch.device, config: EngineConfig, driver: ModelDriver, layout: CacheLayout) -> int:
    """Bytes that the KV cache may take on this device.

    On a CPU: a share of what is free, at most `DEFAULT_CPU_BYTES`. On CUDA: the engine's share of the device, less the
    weights and the peak of a step at its full token budget, which is run here once.
    """
    if device.type == "cpu":
        return min(int(free_cpu_bytes() * config.cache_config.memory_fraction) // 2, DEFAULT_CPU_BYTES)
    peak = _peak_of_full_step(device, config, driver, layout)
    free, total = torch.cuda.mem_get_info(device)
    used_by_others = total - free - torch.cuda.memory_reserved(device)
    budget = int(total * config.cache_config.memory_fraction)
    return max(budget - peak - used_by_others, 0)


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
    """Let the C library do again as it does by itself after a while, and give the system what is free.

    By itself it begins lower, and comes to these bounds where large pieces are freed.
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


def _peak_of_full_step(device: torch.device, config: EngineConfig, driver: ModelDriver, layout: CacheLayout) -> int:
    """Peak bytes of one step of `max_num_batched_tokens` text rows in one sequence, without a cache."""
    num_tokens = min(config.scheduler_config.max_num_batched_tokens, config.model_config.max_model_len)
    positions = np.arange(num_tokens, dtype=np.int64)
    if config.model_config.uses_mrope:
        positions = np.tile(positions, (3, 1))
    torch.cuda.reset_peak_memory_stats(device)
    driver.forward(
        StepInputs(
            input_ids=torch.zeros(num_tokens, dtype=torch.int64, device=device),
            positions=torch.from_numpy(positions).to(device),
            kv_caches=layout.empty(device),
            attn_metadata=AttentionMetadata.without_cache([num_tokens], device=device),
        )
    )
    torch.cuda.synchronize(device)
    peak = int(torch.cuda.max_memory_allocated(device))
    torch.cuda.empty_cache()
    return peak


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers; a shared tensor counts once."""
    return sum(storage.nbytes() for storage in _storages(model))


def _storages(model: nn.Module) -> Iterable[torch.UntypedStorage]:
    tensors = [*model.parameters(), *model.buffers()]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}.values()
