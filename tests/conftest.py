"""What every test starts from: the same random numbers, and no memory of warnings that were already given."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from sensorium import logger


@pytest.fixture(autouse=True)
def same_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a test independent of those before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    monkeypatch.setattr(logger, "_seen", set())
