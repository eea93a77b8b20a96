"""Lays adapters over a loaded model and tries them once, so that an adapter that loads also has an effect."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from sensorium.config import EngineConfig, ModelFeatures
from sensorium.errors import ConfigError, WeightsError
from sensorium.model_executor.adapter_rows import adapter_ids_of_rows
from sensorium.model_executor.drivers import ModelDriver
from sensorium.model_executor.lora.loader import LoadedAdapters, load_adapters
from sensorium.model_executor.model_loader.loader import LoadsItself
from sensorium.model_executor.sampling_metadata import SamplingMetadata
from sensorium.worker.dummy_steps import DummySteps


def lay_adapters(model: nn.Module, config: EngineConfig) -> LoadedAdapters:
    """`load_adapters`, for models that can have any.

    Raises:
        ConfigError: The model runs by modules of transformers.
        WeightsError: See `load_adapters`.
    """
    if config.lora_config is not None and isinstance(config.model_config.model_class, LoadsItself):
        raise ConfigError(
            f"enable_lora: got true for {config.model_config.architecture}, which runs by the modules of transformers, "
            "expected false. Leave enable_lora (--enable-lora) out, or merge the adapter into the model."
        )
    return load_adapters(model, config)


@torch.inference_mode()
def try_adapters(
    adapters: LoadedAdapters,
    config: EngineConfig,
    model: nn.Module,
    driver: ModelDriver,
    steps: DummySteps,
    features: ModelFeatures,
) -> None:
    """Run a text of two tokens with all adapters, and check that it passes through every layer that has one.

    Raises:
        WeightsError: A layer doesn't: it is a tower's, whose rows are shared across adapters.
    """
    if not adapters.methods:
        return
    assert config.lora_config is not None
    placeholders = frozenset().union(*features.placeholder_token_ids.values())
    token_id = next(each for each in range(1, config.model_config.vocab_size) if each not in placeholders)
    step = steps.step([(np.array([token_id] * 2, dtype=np.int64), 0, 2)], steps.caches(2))
    ids = torch.tensor([0, 1], device=steps.device)
    with adapter_ids_of_rows(ids, range(1, len(config.lora_config.modules) + 1)):
        hidden = driver.forward(step)
        if callable(compute_logits := getattr(model, "compute_logits", None)):  # some models only pool
            compute_logits(hidden, SamplingMetadata(len(ids)))
    for method, told in adapters.methods.values():
        if not method.has_run:
            raise WeightsError(
                f"{told}, which no text goes through, expected layers of the decoder and its head. Adapters of towers "
                "and projectors aren't served; train one without them, or merge it into the model."
            )
