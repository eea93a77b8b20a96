"""What a model's `forward` may return."""

from __future__ import annotations

import pytest
import torch

from sensorium.errors import ModelError
from sensorium.worker.passes import _hidden_states


def test_a_forward_that_returns_no_tensor_is_told_what_to_return() -> None:
    rows = torch.ones(2, 4)
    assert _hidden_states(rows) is rows
    for wrong, name in (((rows,), "tuple"), (None, "NoneType"), ({"last_hidden_state": rows}, "dict")):
        with pytest.raises(ModelError, match=f"got a {name} .* hidden states"):
            _hidden_states(wrong)
