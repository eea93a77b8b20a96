"""Model classes, and the registry that finds them by the architecture's name."""

from sensorium.model_executor.models.interfaces import (
    HasInnerState,
    IsAttentionFree,
    IsHybrid,
    SupportsCrossEncoding,
    SupportsLoRA,
    SupportsMultiModal,
    SupportsPP,
    supports_multimodal,
)
from sensorium.model_executor.models.registry import ModelRegistry

__all__ = [
    "HasInnerState",
    "IsAttentionFree",
    "IsHybrid",
    "ModelRegistry",
    "SupportsCrossEncoding",
    "SupportsLoRA",
    "SupportsMultiModal",
    "SupportsPP",
    "supports_multimodal",
]
