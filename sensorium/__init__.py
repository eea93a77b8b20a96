"""Sensorium: a multimodal LLM inference and serving engine.

    from sensorium import LLM, SamplingParams

    llm = LLM(model="path/to/checkpoint")
    prompt = {"prompt": "USER: <image>\\nWhat is this? ASSISTANT:", "multi_modal_data": {"image": image}}
    [output] = llm.generate(prompt, SamplingParams(max_tokens=64))

Importing this package loads neither torch nor transformers; the names below load what they need when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sensorium.engine.args import EngineArgs
    from sensorium.engine.async_llm_engine import AsyncLLMEngine
    from sensorium.engine.llm_engine import LLMEngine
    from sensorium.entrypoints.llm import LLM
    from sensorium.entrypoints.verification.run import verify
    from sensorium.lora import LoRARequest
    from sensorium.model_executor.models.registry import ModelRegistry
    from sensorium.outputs import CompletionOutput, PoolingRequestOutput, RequestOutput
    from sensorium.pooling_params import PoolingParams
    from sensorium.sampling_params import SamplingParams
    from sensorium.structured_outputs import StructuredOutputs

__version__ = "0.2.0"

_HOMES = {
    "LLM": "sensorium.entrypoints.llm",
    "LLMEngine": "sensorium.engine.llm_engine",
    "AsyncLLMEngine": "sensorium.engine.async_llm_engine",
    "EngineArgs": "sensorium.engine.args",
    "LoRARequest": "sensorium.lora",
    "ModelRegistry": "sensorium.model_executor.models.registry",
    "SamplingParams": "sensorium.sampling_params",
    "StructuredOutputs": "sensorium.structured_outputs",
    "RequestOutput": "sensorium.outputs",
    "CompletionOutput": "sensorium.outputs",
    "PoolingParams": "sensorium.pooling_params",
    "PoolingRequestOutput": "sensorium.outputs",
    "verify": "sensorium.entrypoints.verification.run",
}

__all__ = [
    "LLM",
    "AsyncLLMEngine",
    "CompletionOutput",
    "EngineArgs",
    "LLMEngine",
    "LoRARequest",
    "ModelRegistry",
    "PoolingParams",
    "PoolingRequestOutput",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputs",
    "__version__",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sensorium' has no attribute {name!r}")
