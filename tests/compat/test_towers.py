"""Vision towers with V0's constructors: from the names of a checkpoint to the features of Hugging Face."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer

from sensorium.compat.v0.vllm.model_executor.layers.resampler import Resampler2, get_2d_sincos_pos_embed
from sensorium.compat.v0.vllm.model_executor.models.blip import BlipVisionModel
from sensorium.compat.v0.vllm.model_executor.models.clip import CLIPVisionModel
from sensorium.compat.v0.vllm.model_executor.models.glm4_vision_encoder import EVA2CLIPModel
from sensorium.compat.v0.vllm.model_executor.models.idefics2_vision_model import Idefics2VisionTransformer
from sensorium.compat.v0.vllm.model_executor.models.intern_vit import InternVisionModel, InternVisionPatchModel
from sensorium.compat.v0.vllm.model_executor.models.llava import (
    LlavaMultiModalProjector,
    init_vision_tower_for_llava,
)
from sensorium.compat.v0.vllm.model_executor.models.pixtral import PixtralHFVisionModel
from sensorium.compat.v0.vllm.model_executor.models.siglip import SiglipVisionModel
from sensorium.errors import ModelError
from sensorium.model_executor.model_loader.initialize import build_empty
from sensorium.model_executor.model_loader.loader import fill_model, finish_loading
from tests.helpers.direct import relative_error

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def drawn(module: nn.Module) -> nn.Module:
    """With values that differ, norms and biases included."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return module.eval()


def pictures(count: int = 2, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def filled(make: Callable[[], nn.Module], state: Mapping[str, torch.Tensor], load: bool = True) -> Any:
    """A tower with a checkpoint's weights, as the engine loads them."""
    tower = build_empty(make, dtype=torch.float32, device=torch.device("cpu"))
    if load:
        fill_model(tower, ((name, tensor.clone()) for name, tensor in state.items()), may_be_unused=("*",))
    else:
        with torch.no_grad():
            for name, parameter in tower.named_parameters():
                getattr(parameter, "weight_loader", lambda target, value: target.copy_(value))(parameter, state[name])
    finish_loading(tower)
    return tower


def under(level: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{level}{name}": tensor for name, tensor in state.items()}


def renamed(name: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        name = name.replace(old, new)
    return name


ONE_SIZE: dict[str, tuple[Any, Any, type[nn.Module]]] = {
    "clip": (transformers.CLIPVisionConfig, transformers.CLIPVisionModel, CLIPVisionModel),
    "siglip": (transformers.SiglipVisionConfig, transformers.SiglipVisionModel, SiglipVisionModel),
    "blip": (transformers.Blip2VisionConfig, transformers.Blip2VisionModel, BlipVisionModel),
}


@pytest.mark.parametrize("name", ONE_SIZE)
@pytest.mark.parametrize("has_level", [True, False])
def test_towers_of_pictures_of_one_size(name: str, has_level: bool) -> None:
    """Up to a layer, whole, and whole without the final norm; names of checkpoints may lack a level."""
    make_config, make_reference, tower_class = ONE_SIZE[name]
    config = make_config(**SIZES)
    reference = drawn(make_reference(config))
    state = {key.removeprefix("vision_model."): value for key, value in reference.state_dict().items()}
    if has_level and name != "blip":
        state = under("vision_model.", state)
    with torch.no_grad():
        output = reference(pictures(), output_hidden_states=True)
        whole = output.last_hidden_state
        if name == "clip":  # transformers norms the class token's row alone
            whole = next(module for name, module in reference.named_modules() if name.endswith("post_layernorm"))(whole)
        for count, norm, expected in (
            (None, None, whole),
            (2, None, output.hidden_states[2]),
            (3, False, output.hidden_states[3]),
        ):
            settings = {"num_hidden_layers_override": count, "require_post_norm": norm, "prefix": "vision_tower"}
            tower = filled(lambda settings=settings: tower_class(config, None, **settings), state)
            assert relative_error(tower(pictures()), expected) < 1e-5


def test_more_layers_than_there_are_are_refused() -> None:
    with pytest.raises(ModelError, match="layers of a vision tower: got 4, expected 0 to 3"):
        CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES), num_hidden_layers_override=4)


def test_siglip_of_pictures_of_other_sizes() -> None:
    config = transformers.SiglipVisionConfig(**SIZES)
    reference = drawn(transformers.SiglipVisionModel(config))
    tower = filled(lambda: SiglipVisionModel(config), reference.state_dict())
    given = pictures(height=20, width=12)
    with torch.no_grad():
        expected = reference(given, interpolate_pos_encoding=True).last_hidden_state
        assert relative_error(tower(given, interpolate_pos_encoding=True), expected) < 1e-5


@pytest.mark.parametrize("count", [None, 2])
def test_pixtral_of_pictures_of_all_sizes(count: int | None) -> None:
    config = transformers.PixtralVisionConfig(**SIZES)
    reference = drawn(transformers.PixtralVisionModel(config))
    tower = filled(lambda: PixtralHFVisionModel(config, num_hidden_layers_override=count), reference.state_dict())
    given = [pictures(1, 12, 16)[0], pictures(1, 8, 4)[0]]
    sizes = [picture.shape[1:] for picture in given]
    padded = torch.stack([F.pad(picture, (0, 16 - picture.shape[2], 0, 16 - picture.shape[1])) for picture in given])
    with torch.no_grad():
        output = reference(padded, image_sizes=torch.tensor(sizes), output_hidden_states=True)
        expected = output.last_hidden_state if count is None else output.hidden_states[count]
        assert relative_error(tower(given), expected.reshape(1, -1, 32)) < 1e-5


def test_pixtral_has_no_final_norm() -> None:
    with pytest.raises(ModelError, match="require_post_norm"):
        PixtralHFVisionModel(transformers.PixtralVisionConfig(**SIZES), require_post_norm=True)


def test_idefics2_of_pictures_with_padding() -> None:
    """A whole picture, and one that is three patches high and two wide."""
    config = transformers.Idefics3VisionConfig(**SIZES)
    config._attn_implementation = "eager"
    reference = drawn(Idefics3VisionTransformer(config))
    tower = filled(lambda: Idefics2VisionTransformer(config, prefix="vpm"), reference.state_dict())
    assert {"encoder.layers.0.self_attn.qkv_proj.weight", "encoder.layers.2.mlp.fc1.bias"} <= set(
        dict(tower.named_parameters())
    ), "names that MiniCPM-V loads by"
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0], mask[1, :3, :2] = True, True
    with torch.no_grad():
        expected = reference(pictures(), patch_attention_mask=mask).last_hidden_state
        got = tower(pictures(), patch_attention_mask=mask)
        flat = mask.flatten(1)
        assert relative_error(got[flat], expected[flat]) < 1e-5
        assert relative_error(tower(pictures()), reference(pictures()).last_hidden_state) < 1e-5


def test_idefics2_of_patches_in_a_row() -> None:
    """As MiniCPM-V gives them: every picture's patches one behind the other, and how many rows and columns they are."""
    config = transformers.Idefics3VisionConfig(**SIZES)
    tower = filled(lambda: Idefics2VisionTransformer(config), drawn(Idefics3VisionTransformer(config)).state_dict())
    picture = pictures(1, 12, 8)
    row = picture.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 1, 4, 2, 3, 5).reshape(1, 3, 4, 24)
    given = torch.cat([F.pad(row, (0, 8)), torch.zeros(1, 3, 4, 32)])
    mask = torch.zeros(2, 1, 8, dtype=torch.bool)
    mask[0, :, :6], mask[1] = True, True
    with torch.no_grad():
        got = tower(given, patch_attention_mask=mask, tgt_sizes=torch.tensor([[3, 2], [2, 4]]))
        assert relative_error(got[:1, :6], tower(picture)) < 1e-5


def test_intern_vit() -> None:
    """The reference has the names of later checkpoints."""
    names = {
        "embeddings.cls_token": "embeddings.class_embedding",
        "embeddings.patch_embeddings.projection": "embeddings.patch_embedding",
        "embeddings.position_embeddings": "embeddings.position_embedding",
        "encoder.layer.": "encoder.layers.",
        "attention.projection_layer": "attn.proj",
        "attention.q_norm": "attn.q_norm",
        "attention.k_norm": "attn.k_norm",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "lambda_1": "ls1",
        "lambda_2": "ls2",
    }
    for norm_type, qk_norm in (("layer_norm", False), ("rms_norm", True)):
        kind = {"norm_type": norm_type, "use_qk_norm": qk_norm, "attention_bias": not qk_norm}
        settings = {**SIZES, "image_size": (16, 16), "patch_size": (4, 4), "use_mean_pooling": True}
        reference = drawn(transformers.InternVLVisionModel(transformers.InternVLVisionConfig(**settings, **kind)))
        given = reference.state_dict()
        state = {}
        for name, tensor in given.items():
            if ".q_proj." in name:
                parts = [given[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
                state[name.replace("encoder.layer.", "encoder.layers.").replace("attention.q_proj", "attn.qkv")] = (
                    torch.cat(parts)
                )
            elif "_proj." not in name:
                state[renamed(name, names)] = tensor
        own = SimpleNamespace(
            **SIZES,
            norm_type=norm_type,
            qk_normalization=qk_norm,
            qkv_bias=not qk_norm,
            hidden_act="gelu",
            layer_norm_eps=1e-6,
        )
        tower = filled(lambda own=own: InternVisionModel(own, prefix="vision_model"), state)
        cut = filled(lambda own=own: InternVisionModel(own, num_hidden_layers_override=2), state)
        with torch.no_grad():
            output = reference(pictures(), output_hidden_states=True)
            assert relative_error(tower(pictures()), output.hidden_states[3]) < 1e-5
            assert relative_error(cut(pixel_values=pictures()), output.hidden_states[2]) < 1e-5
            patches = filled(lambda own=own: InternVisionPatchModel(own), state, load=False)
            assert relative_error(patches(pixel_values=pictures()), output.hidden_states[0]) < 1e-5


def test_eva2_clip_of_glm_4v() -> None:
    """No library has it, so the reference is its formulas, layer by layer, in torch's own functions."""
    vision = {**SIZES, "in_channels": 3, "num_heads": 2, "num_positions": 17, "hidden_act": "gelu"}
    vision |= {"layer_norm_eps": 1e-6, "scaling_factor": 8, "dropout_prob": 0.0, "num_hidden_layers": 2}
    config = SimpleNamespace(vision_config=vision, hidden_size=24, ffn_hidden_size=40)
    weights = dict(drawn(EVA2CLIPModel(config)).named_parameters())
    tower = filled(lambda: EVA2CLIPModel(config), {name: each.detach() for name, each in weights.items()}, load=False)

    def linear(rows: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(rows, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(rows: torch.Tensor, name: str, eps: float = 1e-6) -> torch.Tensor:
        return F.layer_norm(rows, rows.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    kernel = weights["patch_embedding.proj.weight"].view(32, 3, 4, 4)
    with torch.no_grad():
        patches = F.conv2d(pictures(), kernel, weights["patch_embedding.proj.bias"], 4).flatten(2).mT
        x = torch.cat([weights["patch_embedding.cls_embedding"].expand(2, 1, -1), patches], 1)
        x = x + weights["patch_embedding.position_embedding.weight"]
        for layer in ("transformer.layers.0", "transformer.layers.1"):
            qkv = linear(x, f"{layer}.attention.query_key_value").view(2, 17, 3, 2, 16).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
            x = x + norm(linear(attended, f"{layer}.attention.dense"), f"{layer}.input_layernorm")
            inner = F.gelu(linear(x, f"{layer}.mlp.fc1"))
            x = x + norm(linear(inner, f"{layer}.mlp.fc2"), f"{layer}.post_attention_layernorm")
        grid = x[:, 1:].mT.reshape(2, 32, 4, 4)
        rows = F.conv2d(grid, weights["conv.weight"], weights["conv.bias"], 2).flatten(2).mT
        rows = F.gelu(norm(linear(rows, "linear_proj.linear_proj"), "linear_proj.norm1", 1e-5))
        gate, up = linear(rows, "linear_proj.merged_proj").chunk(2, -1)
        rows = linear(F.silu(gate) * up, "linear_proj.dense_4h_to_h")
        ends = [weights[name].expand(2, 1, -1) for name in ("boi", "eoi")]
        assert relative_error(tower(pictures()), torch.cat([ends[0], rows, ends[1]], 1) / 8) < 1e-5


def test_positions_of_resamplers() -> None:
    """Columns first: sines and cosines of the column in the first half of the channels, of the row in the second."""
    flat = get_2d_sincos_pos_embed(8, (2, 3))
    frequencies = np.array([1.0, 0.01])
    for row in range(2):
        for column in range(3):
            halves = [np.concatenate([np.sin(n * frequencies), np.cos(n * frequencies)]) for n in (column, row)]
            np.testing.assert_allclose(flat[row * 3 + column], np.concatenate(halves), atol=1e-6)
    np.testing.assert_array_equal(get_2d_sincos_pos_embed(8, (2, 3), version=(2, 5)).reshape(6, 8), flat)
    assert not get_2d_sincos_pos_embed(8, 2, cls_token=True)[0].any()


@pytest.mark.parametrize("is_of_minicpm", [True, False])
def test_resampler(is_of_minicpm: bool) -> None:
    """The reference are the formulas of the paper, head by head."""
    settings = {"grid_size": 2, "embed_dim": 16, "num_heads": 2, "kv_dim": 12}
    settings |= {"adaptive": is_of_minicpm, "do_post_projection": is_of_minicpm}
    source = drawn(Resampler2(**settings))
    weights = {name: each.detach().clone() for name, each in source.named_parameters()}
    weights["pos_embed"] = torch.from_numpy(get_2d_sincos_pos_embed(16, 2)).float()
    resampler = filled(lambda: Resampler2(**settings), weights, load=False)
    given = torch.randn(3, 9, 12, generator=torch.Generator().manual_seed(2))

    def norm(rows: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(rows, (16,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    table = weights["pos_embed"]
    places = torch.from_numpy(get_2d_sincos_pos_embed(16, 3)).float()
    if not is_of_minicpm:
        places = F.interpolate(table.T.view(1, 16, 2, 2), (3, 3), mode="bicubic").view(16, 9).T
    patches = norm(given @ weights["kv_proj.weight"].T, "ln_kv")
    inputs = (norm(weights["query"], "ln_q") + table).expand(3, -1, -1), patches + places, patches
    parts = zip(inputs, weights["attn.in_proj_weight"].chunk(3), weights["attn.in_proj_bias"].chunk(3), strict=True)
    q, k, v = (F.linear(*part).unflatten(-1, (2, 8)).transpose(1, 2) for part in parts)
    attended = ((q @ k.mT * 8**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    expected = F.linear(attended, weights["attn.out_proj.weight"], weights["attn.out_proj.bias"])
    if is_of_minicpm:
        expected = norm(expected, "ln_post") @ weights["proj"]
    with torch.no_grad():
        assert relative_error(resampler(given), expected) < 1e-5


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_tower_by_config_of_llava(kind: str) -> None:
    make_config, make_reference, tower_class = ONE_SIZE[kind]
    reference = drawn(make_reference(make_config(**SIZES)))
    for layer in (-2, 2):
        config = transformers.LlavaConfig(vision_config=make_config(**SIZES), vision_feature_layer=layer)
        tower = filled(lambda config=config: init_vision_tower_for_llava(config, None), reference.state_dict())
        assert type(tower) is tower_class
        with torch.no_grad():
            expected = reference(pictures(), output_hidden_states=True).hidden_states[layer]
            assert relative_error(tower(pictures()), expected) < 1e-5
    several = SimpleNamespace(vision_config=make_config(**SIZES), vision_feature_layer=[1, 2])
    with pytest.raises(ModelError, match="with vision_feature_layer \\[1, 2\\], expected"):
        init_vision_tower_for_llava(several)


def test_projector_of_llava() -> None:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**SIZES),
        text_config=transformers.LlamaConfig(hidden_size=24, num_attention_heads=2),
    )
    reference = drawn(transformers.models.llava.modeling_llava.LlavaMultiModalProjector(config))
    projector = filled(lambda: LlavaMultiModalProjector(32, 24, "gelu"), reference.state_dict(), load=False)
    rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert relative_error(projector(rows), reference(rows)) < 1e-5
