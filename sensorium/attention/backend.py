"""What an attention layer needs, what an attention backend is, and which one a layer gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch

from sensorium.attention import sdpa
from sensorium.config import AttentionBackendName
from sensorium.errors import ConfigError
from sensorium.kernels import AttentionRules
from sensorium.kernels import attention as kernels
from sensorium.kernels.gpu import has_triton
from sensorium.kernels.native import DTYPE_CODES, native_refusal
from sensorium.logger import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec(AttentionRules):
    """The constants of one attention layer: its rules and the sizes of its heads.

    The layer's cache is `(2, num_blocks, block_size, num_kv_heads, head_size)`, keys first, where values are as large
    as keys; where they are not, `(num_blocks, block_size, num_kv_heads, head_size + value_size)`, keys first. What
    changes from step to step, such as spans, is in `AttentionMetadata`.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    """Channels of a head's query and key."""
    head_size_v: int | None = None
    """Channels of a head's value and output; `None`: as many as its key has."""

    cache_dtype: torch.dtype | None = None
    """Of its cache; `None`: that of its rows."""

    @property
    def value_size(self) -> int:
        """Channels of a head's value and output."""
        return self.head_size if self.head_size_v is None else self.head_size_v


class PagedAttention(Protocol):
    """Attention over a cache. See `kernels.attention.paged_attention_reference`."""

    def __call__(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        batch: kernels.PagedBatch,
        rules: AttentionRules,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`(T, H, Dv)` or `(T, H * Dv)`, as `query` has heads as an axis or not."""


class VarlenAttention(Protocol):
    """Attention without a cache. See `kernels.attention.varlen_attention_reference`."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor,
        rules: AttentionRules,
        *,
        key_lens: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        row_spans: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`(T, H, Dv)`."""


@dataclass(frozen=True, slots=True)
class AttentionBackend:
    """One way to compute attention: two functions of the same signatures as their plain-torch twins."""

    name: AttentionBackendName
    """As in the setting `attention_backend`."""
    refusal: Callable[[AttentionSpec, str, torch.dtype], str | None]
    """Why it can't run such a layer on a device of such a type, with rows of such a dtype; `None` when it can."""
    paged: PagedAttention
    varlen: VarlenAttention


def _cpu_refusal(spec: AttentionSpec, device_type: str, dtype: torch.dtype) -> str | None:
    if device_type != "cpu":
        return "it needs a CPU"
    for each in (dtype, spec.cache_dtype):
        if each is not None and each not in DTYPE_CODES:
            return f"it has no {str(each).removeprefix('torch.')}"
    return native_refusal()


def _triton_refusal(spec: AttentionSpec, device_type: str, _dtype: torch.dtype) -> str | None:
    if device_type != "cuda":
        return "it needs CUDA"
    if not has_triton():
        return "Triton is not installed"
    largest = max(spec.head_size, spec.value_size)
    return f"heads of {largest} channels are larger than 256" if largest > 256 else None


def _triton_paged(*arguments: Any, **options: Any) -> torch.Tensor:
    from sensorium.kernels.gpu.attention import paged_attention

    return paged_attention(*arguments, **options)


def _triton_varlen(*arguments: Any, **options: Any) -> torch.Tensor:
    from sensorium.kernels.gpu.attention import varlen_attention

    return varlen_attention(*arguments, **options)


def _sdpa_refusal(spec: AttentionSpec, _device_type: str, _dtype: torch.dtype) -> str | None:
    return None if spec.softcap is None else "it has no soft cap"


def _no_refusal(_spec: AttentionSpec, _device_type: str, _dtype: torch.dtype) -> str | None:
    return None


NATIVE_CPU = AttentionBackend("native_cpu", _cpu_refusal, kernels.paged_attention, kernels.varlen_attention)
"""C kernels that read keys and values straight from their blocks. A row's result doesn't depend on those beside it."""
TRITON = AttentionBackend("triton", _triton_refusal, _triton_paged, _triton_varlen)
"""The same on CUDA: decodes split over their keys, and tiles of prefill chunks, without waiting for the device."""
SDPA = AttentionBackend("torch_sdpa", _sdpa_refusal, sdpa.paged_attention, sdpa.varlen_attention)
"""Torch's own fused attention, over keys and values that are gathered from the blocks. Any device."""
REFERENCE = AttentionBackend(
    "torch_reference", _no_refusal, kernels.paged_attention_reference, kernels.varlen_attention_reference
)
"""The oracle: plain torch, one sequence at a time, in float32. Slow, and obviously right; it refuses nothing."""

BACKENDS: dict[AttentionBackendName, AttentionBackend] = {
    backend.name: backend for backend in (NATIVE_CPU, TRITON, SDPA, REFERENCE)
}
"""By name, best first."""


def select_backend(
    spec: AttentionSpec, device_type: str, dtype: torch.dtype, forced: AttentionBackendName | None = None
) -> AttentionBackend:
    """The fastest backend for such a layer; the choice is logged, with the reasons against the others.

    Args:
        spec: The layer's constants.
        device_type: Where its rows are, as in `torch.device.type`.
        dtype: Of its rows.
        forced: The only backend to be tried; `None`: all.

    Raises:
        ConfigError: The forced backend can't run such a layer.
    """
    refusals: list[str] = []
    for backend in BACKENDS.values() if forced is None else (BACKENDS[forced],):
        reason = backend.refusal(spec, device_type, dtype)
        if reason is None:
            _log_choice(spec.head_size, device_type, dtype, backend.name, tuple(refusals))
            return backend
        refusals.append(f"not {backend.name}: {reason}")
    raise ConfigError(
        f"attention_backend: got {forced!r} for a layer with {spec.num_heads} heads of {spec.head_size} channels, "
        f"expected one that can run it: {refusals[0]}. Change attention_backend, or leave it out for the fastest."
    )


@lru_cache(maxsize=64)
def _log_choice(head_size: int, device_type: str, dtype: torch.dtype, name: str, refusals: tuple[str, ...]) -> None:
    """Once for all layers alike."""
    passed_over = f" ({'; '.join(refusals)})" if refusals else ""
    kind = str(dtype).removeprefix("torch.")
    logger.info("Attention for head size %d, %s on %s: %s%s", head_size, kind, device_type, name, passed_over)
