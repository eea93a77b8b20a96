"""Which architectures that generate text transformers has, read from its tables of names without loading a module."""

from __future__ import annotations

TEXT_CLASS = "sensorium.model_executor.models.transformers.model:TransformersForCausalLM"
"""The class that serves architectures of text."""
MEDIA_CLASS = "sensorium.model_executor.models.transformers.media_model:TransformersForConditionalGeneration"
"""The class that serves architectures that take media."""
POOLING_CLASS = "sensorium.model_executor.models.transformers.pooling:TransformersForPooling"
"""The class that serves architectures that don't generate."""


def text_architectures() -> frozenset[str]:
    """Names of classes that generate text from text alone."""
    return _names("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES") - media_architectures()


def media_architectures() -> frozenset[str]:
    """Names of classes that generate text from media, or with an encoder and a decoder."""
    tables = (
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
        "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
        "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    )
    return frozenset().union(*map(_names, tables))


def _names(table: str) -> frozenset[str]:
    from transformers.models.auto import modeling_auto

    values = getattr(modeling_auto, table).values()
    return frozenset(name for value in values for name in ((value,) if isinstance(value, str) else value))
