"""Attention on CUDA by the Triton kernel, which reads keys and values straight from their blocks."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

from sensorium.attention.backend import AttentionSpec
from sensorium.attention.metadata import AttentionMetadata


class TritonBackend:
    """Decodes and prefill chunks in one launch, without waiting for the device."""

    name = "Triton"
    preferred_block_size = 16

    def refusal(self, spec: AttentionSpec, device_type: str, dtype: torch.dtype) -> str | None:
        """Needs CUDA, Triton and heads of an ordinary size."""
        if device_type != "cuda":
            return "it needs CUDA"
        if not _has_triton():
            return "Triton is not installed"
        if spec.head_size > 256:
            return f"heads of {spec.head_size} channels are larger than 256"
        return None

    def paged(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        """See `AttentionBackend.paged`."""
        from sensorium.kernels.triton_attention import paged_attention, write_kv

        write_kv(key, value, kv_cache, metadata.slot_mapping)
        return paged_attention(
            query,
            kv_cache,
            metadata.block_table,
            metadata.cu_seqlens_q,
            metadata.seq_lens,
            scale=spec.scale,
            window=spec.window,
            softcap=spec.softcap,
            max_seqlen_q=metadata.max_seqlen_q,
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
        from sensorium.kernels.triton_attention import varlen_attention

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


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
