"""A checkpoint with random weights, for an architecture of which there is only a config, and perhaps a processor."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sensorium.config import EngineConfig
from sensorium.model_executor.models.transformers.weights import load_hf_model

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.gguf")


@contextmanager
def with_random_weights(config: EngineConfig) -> Iterator[Path]:
    """A folder with the files of a checkpoint but its weights, and seeded random ones instead.

    `config`: with `load_format` "dummy".
    """
    with tempfile.TemporaryDirectory(prefix="sensorium-verify-") as name:
        folder = Path(name)
        shutil.copytree(config.model_config.model, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*_WEIGHTS))
        model: Any = load_hf_model(config)
        spread(model, config.model_config.seed)
        model.save_pretrained(folder)
        # What stands in the checkpoint's own file counts, special values of it included.
        shutil.copyfile(Path(config.model_config.model) / "config.json", folder / "config.json")
        yield folder


def spread(model: torch.nn.Module, seed: int) -> None:
    """Draw matrices larger than models initialize them, so that attention looks at some rows more than at others, and
    what is wrong shows. Vectors, convolutions and what recurrences decay by stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point() or parameter.dim() < 2 or "A_log" in name or "conv" in name:
                continue
            fan_in = parameter.shape[-1] if "embed" not in name else 1
            values = torch.empty(parameter.shape).normal_(0, 1.2 * fan_in**-0.5, generator=generator)
            parameter.copy_(values)
