"""Attention on the CPU by the native kernels, which read keys and values straight from their blocks."""

from __future__ import annotations

import torch

from sensorium.attention.backend import AttentionSpec
from sensorium.attention.metadata import AttentionMetadata
from sensorium.kernels.attention import paged_attention, varlen_attention
from sensorium.kernels.native import native_refusal


class CpuBackend:
    """Decodes and prefill chunks in one native call. A row's result doesn't depend on the rows beside it."""

    name = "native CPU"

    def refusal(self, spec: AttentionSpec, device_type: str, dtype: torch.dtype) -> str | None:
        """Needs the native kernels."""
        return native_refusal()

    def paged(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        """See `AttentionBackend.paged`."""
        return paged_attention(
            query,
            kv_cache,
            metadata.block_table,
            metadata.cu_seqlens_q,
            metadata.seq_lens,
            scale=spec.scale,
            window=spec.window,
            softcap=spec.softcap,
        )

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
        """See `AttentionBackend.varlen`."""
        return varlen_attention(
            query,
            key,
            value,
            cu_seqlens,
            scale=spec.scale,
            causal=causal,
            key_lens=key_lens,
            window=spec.window,
            softcap=spec.softcap,
        )
