"""Shared by model files: weights by name, merging of media rows, stacks of layers, sub-models.

Names, signatures and semantics are those of vLLM; each docstring says what holds here.
"""

from __future__ import annotations

from sensorium.model_executor.models.embeddings import (
    embed_multimodal,
    flatten_bn,
    merge_multimodal_embeddings,
    merge_multimodal_embeddings_from_map,
)
from sensorium.model_executor.models.modules import (
    PPMissingLayer,
    init_registered_model,
    init_vllm_registered_model,
    is_pp_missing_parameter,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
    missing_inner_model,
)
from sensorium.model_executor.models.weights import AutoWeightsLoader, WeightsMapper, default_weight_loader
from sensorium.multimodal.utils import is_list_of

__all__ = [
    "AutoWeightsLoader",
    "PPMissingLayer",
    "WeightsMapper",
    "default_weight_loader",
    "embed_multimodal",
    "flatten_bn",
    "init_registered_model",
    "init_vllm_registered_model",
    "is_list_of",
    "is_pp_missing_parameter",
    "make_empty_intermediate_tensors_factory",
    "make_layers",
    "maybe_prefix",
    "merge_multimodal_embeddings",
    "merge_multimodal_embeddings_from_map",
    "missing_inner_model",
]
