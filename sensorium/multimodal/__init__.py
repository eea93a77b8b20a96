"""Media: which kinds there are, how they become tensors, and how many decoder rows they take.

A model author decorates a class with `MULTIMODAL_REGISTRY`. Importing this package loads neither torch nor
transformers.
"""

from sensorium.multimodal.base import (
    IndexMap,
    MultiModalInputMapper,
    MultiModalPlaceholderMap,
    MultiModalPlugin,
    MultiModalTokensCalc,
)
from sensorium.multimodal.inputs import (
    AudioItem,
    BatchedTensorInputs,
    ImageItem,
    MultiModalData,
    MultiModalDataBuiltins,
    MultiModalDataDict,
    MultiModalInputs,
    MultiModalInputsV2,
    MultiModalKwargs,
    MultiModalPlaceholderDict,
    NestedTensors,
    PlaceholderRange,
    VideoItem,
)
from sensorium.multimodal.registry import MultiModalRegistry

MULTIMODAL_REGISTRY = MultiModalRegistry()
"""The registry that model classes are decorated with."""

__all__ = [
    "MULTIMODAL_REGISTRY",
    "AudioItem",
    "BatchedTensorInputs",
    "ImageItem",
    "IndexMap",
    "MultiModalData",
    "MultiModalDataBuiltins",
    "MultiModalDataDict",
    "MultiModalInputMapper",
    "MultiModalInputs",
    "MultiModalInputsV2",
    "MultiModalKwargs",
    "MultiModalPlaceholderDict",
    "MultiModalPlaceholderMap",
    "MultiModalPlugin",
    "MultiModalRegistry",
    "MultiModalTokensCalc",
    "NestedTensors",
    "PlaceholderRange",
    "VideoItem",
]
