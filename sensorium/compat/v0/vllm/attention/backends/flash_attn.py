"""The batch description of V0's backend of that name."""

from sensorium.attention import AttentionMetadata

__all__ = ["FlashAttentionMetadata"]


class FlashAttentionMetadata(AttentionMetadata):
    """Never made: no batch here is an instance of it."""
