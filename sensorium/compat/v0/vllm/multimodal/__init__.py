"""Names of `vllm.multimodal`."""

from sensorium.multimodal.inputs import MultiModalKwargs

__all__ = ["MultiModalInputs"]

MultiModalInputs = MultiModalKwargs
"""The name of 0.6.3."""
