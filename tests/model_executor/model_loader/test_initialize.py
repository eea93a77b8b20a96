"""Models are built without filling them: parameters wait for the checkpoint, everything else is real."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from sensorium.model_executor.layers.linear import ColumnParallelLinear
from sensorium.model_executor.model_loader.initialize import build_empty, fill_with_random
from tests.helpers.waiting import HANG_S

CPU = torch.device("cpu")


class Plain(nn.Module):
    """A constructor that computes a buffer, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.ours = ColumnParallelLinear(8, 4)
        self.norm = nn.LayerNorm(4)
        self.tied = nn.Linear(8, 4, bias=False)
        self.tied.weight = self.linear.weight
        self.register_buffer("frequencies", 1.0 / 100.0 ** (torch.arange(4).float() / 4), persistent=False)
        self.learned = nn.Parameter(torch.zeros(3))


class NeedsValues(Plain):
    """A constructor that looks at the values of its own parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = float(self.linear.weight.max())


class FillsAnEmptyBuffer(Plain):
    """A constructor that makes a buffer with `torch.empty` and fills it itself."""

    def __init__(self) -> None:
        super().__init__()
        table = torch.empty(3)
        table[:] = torch.tensor([1.0, 2.0, 3.0])
        self.register_buffer("table", table)


@pytest.mark.parametrize("kind", [Plain, NeedsValues, FillsAnEmptyBuffer])
def test_everything_has_memory_in_the_right_dtype(kind: type[Plain]) -> None:
    model = build_empty(kind, dtype=torch.bfloat16, device=CPU)
    assert isinstance(model, Plain)
    assert all(not p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    assert torch.equal(model.frequencies, 1.0 / 100.0 ** (torch.arange(4).float() / 4))
    assert model.tied.weight is model.linear.weight
    if isinstance(model, FillsAnEmptyBuffer):
        assert model.table.tolist() == [1.0, 2.0, 3.0]
    if isinstance(model, NeedsValues):
        assert model.largest > 0


def test_parameters_keep_their_loaders() -> None:
    model = build_empty(Plain, dtype=torch.float32, device=CPU)
    assert isinstance(model, Plain)
    model.ours.weight.weight_loader(model.ours.weight, torch.ones(4, 8))  # type: ignore[attr-defined]
    assert (model.ours.weight == 1).all()


def test_the_default_dtype_is_put_back() -> None:
    before = torch.get_default_dtype()
    with pytest.raises(ZeroDivisionError):
        build_empty(lambda: 1 / 0, dtype=torch.float16, device=CPU)  # type: ignore[arg-type,return-value]
    assert torch.get_default_dtype() == before


def test_random_values_fill_every_parameter_the_same_way_again() -> None:
    models = [build_empty(Plain, dtype=torch.float32, device=CPU) for _ in range(2)]
    for model in models:
        fill_with_random(model, seed=5)
    first, second = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["linear.weight"].std() > 0.1
    assert not first["linear.bias"].any()
    assert (first["norm.weight"] == 1).all()


def test_parameters_that_wait_are_not_filled_and_torchs_compiler_is_not_imported() -> None:
    """Torch's twin of `normal_` for tensors without memory imports all of `torch._dynamo`, a second of every start."""
    code = (
        "import sys, torch\n"
        "from sensorium.model_executor.model_loader.initialize import build_empty\n"
        "build_empty(lambda: torch.nn.Embedding(4, 4), dtype=torch.float32, device=torch.device('cpu'))\n"
        "print('torch._dynamo' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_S, check=True)
    assert result.stdout.strip() == "False"
