"""Kinds of media data, where the files of 0.6.3 find them."""

from sensorium.multimodal.base import MultiModalPlugin
from sensorium.multimodal.inputs import MultiModalData, MultiModalDataDict, MultiModalKwargs, NestedTensors

__all__ = ["MultiModalData", "MultiModalDataDict", "MultiModalInputs", "MultiModalPlugin", "NestedTensors"]

MultiModalInputs = MultiModalKwargs
