"""What an item must be before it is computed with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sensorium.errors import InvalidRequestError
from sensorium.multimodal.item_checks import check_arrays


def nested(depth: int) -> Any:
    value: Any = np.ones(1)
    for _ in range(depth):
        value = {"a": [value]}
    return value


@pytest.mark.parametrize(
    "value",
    [np.array([np.inf]), [np.ones(2), np.array([np.nan])], {"a": (1, torch.tensor(float("nan")))}, nested(20)],
    ids=["infinite", "in a list", "in a dict", "nested"],
)
def test_values_that_can_not_be_computed_with_are_found_anywhere(value: Any) -> None:
    with pytest.raises(InvalidRequestError, match="image data"):
        check_arrays("image", value)


@pytest.mark.parametrize(
    "value", [np.ones(2), np.array([1, 2]), torch.ones(2, dtype=torch.int8), nested(2), object(), "a"]
)
def test_other_values_pass(value: Any) -> None:
    check_arrays("image", value)
