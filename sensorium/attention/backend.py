"""What an attention backend is, and which one a layer gets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch

from sensorium.attention.metadata import AttentionMetadata
from sensorium.logger import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """The constants of one attention layer."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    window: int | None = None
    """How many positions a position sees, itself included; `None` for all."""
    softcap: float | None = None
    """`c` in `c * tanh(score / c)`; `None` for none."""


class AttentionBackend(Protocol):
    """Computes attention one way. Stateless: the same instance serves every layer."""

    name: str

    def refusal(self, spec: AttentionSpec, device_type: str, dtype: torch.dtype) -> str | None:
        """Why this backend can't run such a layer, or `None` when it can."""

    def paged(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        """Attend causally over the cache, which already holds the step's keys and values.

        `query` is `(T, heads, D)` or flat, `(T, heads * D)`; the result is like it.
        """

    def varlen(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor,
        spec: AttentionSpec,
        *,
        causal: bool,
        key_lens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend within each sequence of a flat batch, without a cache: `(T, heads, D)` all, as is the result."""


def _candidates(device_type: str) -> list[AttentionBackend]:
    """Backends for a device, best first. The last one accepts everything."""
    from sensorium.attention.cpu import CpuBackend
    from sensorium.attention.sdpa import SdpaBackend
    from sensorium.attention.torch_reference import TorchReferenceBackend
    from sensorium.attention.triton import TritonBackend

    fallbacks: list[AttentionBackend] = [SdpaBackend(), TorchReferenceBackend()]
    return [CpuBackend() if device_type == "cpu" else TritonBackend(), *fallbacks]


@lru_cache(maxsize=64)
def select_backend(spec: AttentionSpec, device_type: str, dtype: torch.dtype) -> AttentionBackend:
    """The fastest backend for such a layer; the choice is logged once, with what spoke against the others."""
    refusals: list[str] = []
    for backend in _candidates(device_type):
        reason = backend.refusal(spec, device_type, dtype)
        if reason is None:
            passed_over = f" ({'; '.join(refusals)})" if refusals else ""
            logger.info(
                "Attention for head size %d, %s on %s: %s%s",
                *(spec.head_size, str(dtype).removeprefix("torch."), device_type, backend.name, passed_over),
            )
            return backend
        refusals.append(f"not {backend.name}: {reason}")
    raise AssertionError("the reference backend accepts every layer")
