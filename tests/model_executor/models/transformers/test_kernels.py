"""Norms and linear layers of transformers' modules by this engine's kernels: where they compute the same, and held in
fewer bits if asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from sensorium.errors import ConfigError
from sensorium.model_executor.models.transformers.norms import KernelNorms
from sensorium.model_executor.models.transformers.packing import KernelLinear, SetAside
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.generic import load_generic, served_tokens

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Norm(nn.Module):
    """Norms as transformers' models write them; `kind` says in which way."""

    def __init__(self, kind: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind, self.eps = kind, 1e-6
        noise = torch.randn(48, generator=torch.Generator().manual_seed(1)) * 0.2
        self.weight = nn.Parameter((noise if kind == "stored less 1" else 1 + noise).to(dtype), requires_grad=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = hidden_states.float()
        if self.kind == "centered":
            wide = wide - wide.mean(-1, keepdim=True)
        eps = 0.0 if self.kind == "another eps" else self.eps
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        if self.kind == "stored less 1":
            return (normed * (1 + self.weight.float())).type_as(hidden_states)
        if self.kind == "weight in float32":
            return (self.weight.float() * normed).type_as(hidden_states)
        return self.weight * normed.type_as(hidden_states)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["plain", "weight in float32", "stored less 1"])
def test_norms_of_known_formulas_run_by_the_kernel(kind: str, dtype: torch.dtype) -> None:
    """As the module itself, up to the order of a sum, on other rows than those that it was tried on."""
    model = nn.Sequential(Norm(kind, dtype))
    rows = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected = model(rows)
    norms = KernelNorms(model)
    assert len(norms) == 1
    torch.testing.assert_close(model(rows), expected, rtol=4 * torch.finfo(dtype).eps, atol=0)
    norms.restore()
    assert torch.equal(model(rows), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["centered", "another eps"])
def test_norms_of_other_formulas_stay(kind: str, dtype: torch.dtype) -> None:
    assert len(KernelNorms(nn.Sequential(Norm(kind, dtype)))) == 0


def test_torch_norms_and_modules_that_are_no_norms_stay() -> None:
    """A linear layer has a vector too; a module that fails on rows must not end the search."""
    assert len(KernelNorms(nn.Sequential(nn.LayerNorm(48), nn.BatchNorm1d(48), nn.Linear(48, 1), nn.PReLU(48)))) == 0


def test_a_head_tied_to_the_embeddings_keeps_their_table() -> None:
    embeddings, head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
    head.weight = embeddings.weight
    model = nn.ModuleDict({"embeddings": embeddings, "head": head, "same": head})
    ids = torch.arange(5)
    expected = head(embeddings(ids))
    SetAside(model, lambda: head(embeddings(ids))).hand_over()
    assert isinstance(model["head"], KernelLinear)
    assert model["same"] is model["head"]
    for layer in (model["head"], head):  # the layer itself too, for those that hold it
        torch.testing.assert_close(layer(embeddings(ids)), expected)


def test_weights_are_quantized_as_those_of_a_native_class() -> None:
    """Fused or not, each output channel has a scale of its own, so that the tokens are the same."""
    path = make_checkpoint("llama")
    expected = served_tokens(path, model_impl="native", quantization="int8")
    assert served_tokens(path, quantization="int8") == expected
    assert served_tokens(path) != expected, "int8 makes no difference on this checkpoint"
    _, report = load_generic(path, quantization="int8")
    assert "int8 weights in 22 layers" in report.weights
    assert "model.layers.*.mlp.down_proj" in report.weights


def test_quantized_checkpoints_are_refused(tmp_path: Path) -> None:
    path = shutil.copytree(make_checkpoint("llama"), tmp_path / "fp8")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="quantized already, expected float weights"):
        load_generic(path)


def test_nothing_is_quantized_unseen() -> None:
    with pytest.raises(ConfigError, match="load_check 'off'"):
        load_generic(make_checkpoint("llama"), quantization="int8", load_check="off")
