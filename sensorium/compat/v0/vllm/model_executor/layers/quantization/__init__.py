"""Quantizations of V0. Classes of those that aren't served exist for files that ask whether a model has one of them."""

from __future__ import annotations

from sensorium.compat.v0.vllm.model_executor.layers.quantization.awq import AWQConfig
from sensorium.compat.v0.vllm.model_executor.layers.quantization.gptq import GPTQConfig
from sensorium.compat.v0.vllm.model_executor.layers.quantization.gptq_marlin import GPTQMarlinConfig

__all__ = ["AWQConfig", "GPTQConfig", "GPTQMarlinConfig"]
