"""Where GPU kernels are tested: on a GPU if there is one, else by Triton's interpreter, which runs the same code."""

from __future__ import annotations

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
triton = pytest.importorskip("triton", reason="Triton is not installed")
OLD_INTERPRETER = DEVICE == "cpu" and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not OLD_INTERPRETER:
        return
    skip = pytest.mark.skip(reason="the interpreter of this Triton doesn't work with today's numpy")
    for item in items:
        if "tests/kernels/gpu" in str(item.path):
            item.add_marker(skip)


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE)
