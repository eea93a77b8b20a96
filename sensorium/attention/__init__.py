"""Attention for models: the layers, the batch description that they share, and the choice of backend.

One backend per file (`cpu`, `sdpa`, `torch_reference`) behind the protocol in `backend`. Knows nothing of
requests, scheduling or memory: the worker owns the cache tensors and builds the metadata.
"""

from sensorium.attention.layer import Attention, AttentionType, MultiHeadAttention
from sensorium.attention.metadata import NO_SLOT, AttentionMetadata, LayerCache, compute_slot_mapping

__all__ = [
    "NO_SLOT",
    "Attention",
    "AttentionMetadata",
    "AttentionType",
    "LayerCache",
    "MultiHeadAttention",
    "compute_slot_mapping",
]
