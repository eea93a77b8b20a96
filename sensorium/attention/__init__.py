"""Attention for models: the layers, the batch description that they share, and the choice of backend.

`backend` has the backends, each two functions: those of `sensorium.kernels`, or torch's own (`sdpa`). Knows nothing of
requests, scheduling or memory: the worker owns the cache tensors and builds the metadata.
"""

from sensorium.attention.backend import BACKENDS, AttentionSpec
from sensorium.attention.layer import Attention, AttentionType, MultiHeadAttention, choose_backends
from sensorium.attention.metadata import (
    NO_SLOT,
    AttentionMetadata,
    CrossBatch,
    LayerCache,
    compute_row_spans,
    compute_slot_mapping,
)

__all__ = [
    "BACKENDS",
    "NO_SLOT",
    "Attention",
    "AttentionMetadata",
    "AttentionSpec",
    "AttentionType",
    "CrossBatch",
    "LayerCache",
    "MultiHeadAttention",
    "choose_backends",
    "compute_row_spans",
    "compute_slot_mapping",
]
