"""The oracle: attention in plain torch, one sequence at a time, in float32. Slow, and obviously right."""

from __future__ import annotations

import torch

from sensorium.attention.backend import AttentionSpec
from sensorium.attention.metadata import AttentionMetadata
from sensorium.kernels.attention import (
    paged_attention_reference,
    varlen_attention_reference,
)


class TorchReferenceBackend:
    """Every option, every device, every dtype; what the other backends are tested against."""

    name = "torch reference"

    def refusal(self, spec: AttentionSpec, device_type: str, dtype: torch.dtype) -> str | None:
        """Nothing is refused."""
        return None

    def paged(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        """See `AttentionBackend.paged`."""
        return paged_attention_reference(
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
        return varlen_attention_reference(
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
