"""Tiny adapters written by hand as PEFT writes them, and the Hugging Face model with one merged."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from tests.helpers.checkpoints import make_hf_model

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class TinyAdapter:
    """An adapter of a family's Hugging Face model: random matrices, large enough to change answers."""

    family: str
    modules: Sequence[str] = (*ATTENTION, *MLP)
    within: str = ""
    """A pattern that names of layers contain."""
    rank: int = 4
    alpha: float = 6.0
    rslora: bool = False
    seed: int = 1
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def rank_of(self, name: str) -> int:
        return next((rank for key, rank in self.rank_pattern.items() if name.endswith(key)), self.rank)

    def scale_of(self, name: str) -> float:
        alpha = next((alpha for key, alpha in self.alpha_pattern.items() if name.endswith(key)), self.alpha)
        return alpha / (math.sqrt(self.rank_of(name)) if self.rslora else self.rank_of(name))

    def pairs(self, model: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The matrices of each layer, by its name in the Hugging Face model."""
        generator = torch.Generator().manual_seed(self.seed)
        found = {}
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in self.modules and re.search(self.within, name):
                assert isinstance(module, nn.Linear)
                rank = self.rank_of(name)
                down = torch.randn(rank, module.in_features, generator=generator) * module.in_features**-0.5
                up = torch.randn(module.out_features, rank, generator=generator) * 0.4
                found[name] = down, up
        assert found
        return found

    def config(self) -> dict[str, Any]:
        """As recent versions of PEFT write it, with the settings that are off."""
        return {
            "alora_invocation_tokens": None,
            "alpha_pattern": dict(self.alpha_pattern),
            "auto_mapping": None,
            "base_model_name_or_path": "base",
            "bias": "none",
            "corda_config": None,
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "layer_replication": None,
            "layers_to_transform": None,
            "loftq_config": {},
            "lora_alpha": self.alpha,
            "lora_bias": False,
            "lora_dropout": 0.1,
            "megatron_core": "megatron.core",
            "modules_to_save": None,
            "peft_type": "LORA",
            "peft_version": "0.18.0",
            "qalora_group_size": 16,
            "r": self.rank,
            "rank_pattern": dict(self.rank_pattern),
            "target_modules": list(self.modules),
            "target_parameters": None,
            "task_type": "CAUSAL_LM",
            "trainable_token_indices": None,
            "use_dora": False,
            "use_qalora": False,
            "use_rslora": self.rslora,
        }

    def save(self, folder: Path, **changed: Any) -> Path:
        """Write it; `changed` are settings of the config."""
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(self.config() | changed))
        tensors = {}
        for name, (down, up) in self.pairs(make_hf_model(self.family)).items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = down
            tensors[f"base_model.model.{name}.lora_B.weight"] = up
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    @torch.no_grad()
    def merged(self) -> Any:
        """The Hugging Face model with `weight + scale * up @ down`."""
        model = make_hf_model(self.family)
        for name, (down, up) in self.pairs(model).items():
            weight = model.get_submodule(name).weight
            assert isinstance(weight, torch.Tensor)
            weight += self.scale_of(name) * up @ down
        return model
