"""What the engine does for classes that were written for vLLM 0.6, and for no others."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlavaConfig

from sensorium import ModelRegistry, plugins
from sensorium.compat.v0.hf_configs import as_of_release
from sensorium.compat.v0.hf_processors import cached_get_image_processor, cached_get_processor
from sensorium.compat.v0.inner_models import ScalingDecoder
from sensorium.compat.v0.vllm.config import VllmConfig
from sensorium.compat.v0.vllm.model_executor.models.utils import LLMWrapper, init_vllm_registered_model
from sensorium.config import EngineConfig
from sensorium.model_executor.adapter import construct_model
from sensorium.model_executor.layers.linear import ColumnParallelLinear
from sensorium.model_executor.models.utils import embed_multimodal
from sensorium.plugins import load_plugin, style_of
from tests.helpers.checkpoints import MAX_PIXELS, MIN_PIXELS, make_checkpoint
from tests.helpers.direct import engine_config
from tests.helpers.processors import make_image

MODEL = """
from torch import nn
from vllm.config import VllmConfig


class {name}(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config

    def forward(self, input_ids, positions, kv_caches, attn_metadata): ...

    def compute_logits(self, hidden_states, sampling_metadata): ...

    def load_weights(self, weights): ...


class PartOf{name}(nn.Module):
    def forward(self, x): ...
"""


def load(tmp_path: Path, name: str, more: str = "") -> Any:
    file = tmp_path / f"file_of_{name}.py"
    file.write_text(MODEL.format(name=name) + more)
    return load_plugin(str(file))


def test_a_file_that_registers_nothing_serves_its_models_by_their_names(tmp_path: Path) -> None:
    module = load(tmp_path, "UnregisteredV0")
    assert ModelRegistry.resolve("UnregisteredV0") == (module.UnregisteredV0, "UnregisteredV0")
    assert "PartOfUnregisteredV0" not in ModelRegistry.get_supported_archs()


def test_a_file_that_registers_its_models_is_left_to_do_it(tmp_path: Path) -> None:
    more = "from vllm import ModelRegistry\nModelRegistry.register_model('OtherArch', RegisteredV0)\n"
    module = load(tmp_path, "RegisteredV0", more)
    assert ModelRegistry.resolve("OtherArch")[0] is module.RegisteredV0
    assert "RegisteredV0" not in ModelRegistry.get_supported_archs()


def test_constructors_of_v0_get_its_configuration(tmp_path: Path) -> None:
    """Qwen2-VL's refused to be made where prefixes are cached, which is right for media here."""
    config = engine_config(make_checkpoint("mistral"))
    assert config.cache_config.enable_prefix_caching
    module = load(tmp_path, "ConstructedV0")
    seen: Any = construct_model(module.ConstructedV0, config)
    assert isinstance(seen.config, VllmConfig)
    assert not seen.config.cache_config.enable_prefix_caching
    assert seen.config.cache_config.sliding_window == 24
    assert seen.config.parallel_config.pipeline_parallel_size == 1
    assert seen.config.with_hf_config(config.model_config.hf_config).cache_config == seen.config.cache_config
    assert style_of(module.ConstructedV0) is not None
    assert style_of(nn.Module) is None


def test_a_package_is_found_by_the_entry_point_of_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package_of_vllm.py").write_text(
        "def register():\n    from vllm import ModelRegistry\n"
        "    ModelRegistry.register_model('ArchOfEntryPoint', 'package_of_vllm_model:Model')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugins, "_loaded", False)
    points = [
        EntryPoint("theirs", "package_of_vllm:register", plugins.GROUP_OF_VLLM),
        EntryPoint("vllm's own", "vllm.plugins.no_such_module:register", plugins.GROUP_OF_VLLM),
    ]
    monkeypatch.setattr(plugins, "entry_points", lambda group: [each for each in points if each.group == group])
    plugins.load_general_plugins()
    assert "ArchOfEntryPoint" in ModelRegistry.get_supported_archs()
    assert plugins.failed_plugins() == ""


def test_rows_of_media_may_come_from_a_function() -> None:
    ids = torch.tensor([1, 9, 9, 2])
    rows = torch.randn(2, 4)
    seen: list[torch.Tensor] = []

    def encode(placeholders: torch.Tensor) -> torch.Tensor:
        seen.append(placeholders)
        return rows

    def embed(text: torch.Tensor) -> torch.Tensor:
        return text[:, None].float().expand(-1, 4)

    merged = embed_multimodal(ids, 9, embed, encode)
    assert torch.equal(merged, embed_multimodal(ids, 9, embed, rows))
    assert torch.equal(merged[1:3], rows)
    assert seen[0].tolist() == [9, 9]


def test_loaders_find_the_axes_of_a_parameter() -> None:
    """A file that reorders fused heads where it finds `output_dim` computed wrong tokens without it."""
    layer = ColumnParallelLinear(8, 6)
    names = ("output_dim", "input_dim", "packed_dim")
    assert [getattr(layer.weight, name, None) for name in names] == [0, 1, None]
    assert [getattr(layer.bias, name, None) for name in names] == [0, None, None]


def in_construction(family: str) -> Any:
    """The text model of a checkpoint, made as an inner model of V0."""
    config: EngineConfig = engine_config(make_checkpoint(family))
    text = config.model_config.hf_config
    return init_vllm_registered_model(text, vllm_config=replace(config), prefix="language_model")


def test_inner_models_have_what_outer_classes_take_from_them() -> None:
    inner = in_construction("llama")
    for module in (inner, inner.model):
        tensors = module.make_empty_intermediate_tensors(3, torch.float32, torch.device("cpu"))
        assert tensors["hidden_states"].shape == (3, 64)
    assert inner.sampler is not None
    wrapped = LLMWrapper(inner, "model_of_wrapper")
    assert wrapped.model_of_wrapper is inner
    assert wrapped.lm_head is inner.lm_head


def test_the_inner_gemma_scales_what_it_is_given() -> None:
    inner = in_construction("gemma")
    assert isinstance(inner.model, ScalingDecoder)
    ids = torch.tensor([3, 4])
    assert torch.equal(inner.model.get_input_embeddings(ids), inner.model.embed_tokens(ids))


def test_configs_are_seen_as_they_were() -> None:
    text = {"model_type": "llama", "hidden_size": 96, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    config = LlavaConfig(text_config=text)
    as_of_release(config)
    assert config.text_config.rope_theta == 5e5
    assert config.hidden_size == 96


def test_processors_are_seen_as_they_were() -> None:
    path = str(make_checkpoint("qwen2_vl"))
    pictures = cached_get_image_processor(path)
    assert (pictures.min_pixels, pictures.max_pixels) == (MIN_PIXELS, MAX_PIXELS)
    assert pictures.merge_size == 2
    image = make_image(seed=1)
    mapped = pictures.preprocess(images=[image], videos=None, return_tensors="pt")
    assert set(mapped) == {"pixel_values", "image_grid_thw"}
    frames = np.zeros((2, 28, 28, 3), np.uint8)
    clip = pictures.preprocess(images=None, videos=[frames], return_tensors="pt")
    assert set(clip) == {"pixel_values_videos", "video_grid_thw"}
    whole = cached_get_processor(path)
    assert whole.image_processor.min_pixels == MIN_PIXELS
    assert whole.image_token == whole.image_token.content
