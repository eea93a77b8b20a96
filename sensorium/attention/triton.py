"""Attention on CUDA by Triton kernels, which read keys and values straight from their blocks."""

from __future__ import annotations

import torch

from sensorium.attention.backend import AttentionSpec
from sensorium.attention.metadata import AttentionMetadata
from sensorium.kernels.gpu import has_triton


class TritonBackend:
    """Decodes split over their keys, and tiles of prefill chunks, without waiting for the device."""

    name = "Triton"

    def refusal(self, spec: AttentionSpec, device_type: str, dtype: torch.dtype) -> str | None:
        """Needs CUDA, Triton and heads of an ordinary size."""
        if device_type != "cuda":
            return "it needs CUDA"
        if not has_triton():
            return "Triton is not installed"
        if spec.head_size > 256:
            return f"heads of {spec.head_size} channels are larger than 256"
        return None

    def paged(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        """See `AttentionBackend.paged`."""
        from sensorium.kernels.gpu.attention import paged_attention

        return paged_attention(
            query,
            kv_cache,
            metadata.block_table,
            metadata.cu_seqlens_q,
            metadata.seq_lens,
            scale=spec.scale,
            window=spec.window,
            softcap=spec.softcap,
            has_decodes=metadata.has_decodes,
            has_chunks=metadata.max_seqlen_q > 1,
            key_lens=None if metadata.is_recorded else metadata.seq_lens_host,
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
        from sensorium.kernels.gpu.attention import varlen_attention

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
