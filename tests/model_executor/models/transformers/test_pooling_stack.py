"""A stack that ends with a pooler: what stands in for it must pool other rows, not repeat those of the trial."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from sensorium.model_executor.models.transformers.trunk import Trunk


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pooler = nn.Linear(4, 2)

    def forward(self, input_ids: torch.Tensor) -> BaseModelOutputWithPooling:
        rows = torch.ones(*input_ids.shape, 4)
        return BaseModelOutputWithPooling(last_hidden_state=rows, pooler_output=self.pooler(rows))


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = Stack()

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.stack(input_ids).pooler_output)


@torch.inference_mode()
def test_what_stands_in_for_a_stack_pools_its_rows() -> None:
    """GTE and Nomic BERT pool inside of the module that holds their layers."""
    model = Classifier()
    trunk = Trunk(model, model.stack)
    trunk.run({"input_ids": torch.zeros(1, 3, dtype=torch.long)})
    rows = torch.randn(2, 5, 4)
    found = trunk.behind(rows, {"input_ids": torch.zeros(2, 5, dtype=torch.long)}).logits
    assert torch.equal(found, model.stack.pooler(rows))
