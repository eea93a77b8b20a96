"""V0's interface to the ranks that share a model."""

from sensorium.compat.v0.vllm.distributed.communication_op import (
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from sensorium.compat.v0.vllm.distributed.parallel_state import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    get_tp_group,
)
from sensorium.compat.v0.vllm.distributed.utils import (
    divide,
    ensure_divisibility,
    get_pp_indices,
    split_tensor_along_last_dim,
)

__all__ = [
    "divide",
    "ensure_divisibility",
    "get_pp_group",
    "get_pp_indices",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_world_size",
    "get_tp_group",
    "split_tensor_along_last_dim",
    "tensor_model_parallel_all_gather",
    "tensor_model_parallel_all_reduce",
]
