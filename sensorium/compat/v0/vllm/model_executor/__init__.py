"""Names of `vllm.model_executor`."""

from sensorium.compat.v0.vllm.model_executor.utils import set_random_seed
from sensorium.model_executor.sampling_metadata import SamplingMetadata

__all__ = ["SamplingMetadata", "set_random_seed"]
