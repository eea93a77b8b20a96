"""What all backends had in common."""

from sensorium.attention import AttentionMetadata, AttentionType

__all__ = ["AttentionMetadata", "AttentionType"]
