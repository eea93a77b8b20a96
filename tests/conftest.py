"""What every test starts from: the same random numbers, and no memory of warnings that were already given."""

from __future__ import annotations

import logging
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

# Models of a few thousand weights gain nothing from threads, and lose much where test processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where kernels are compiled by ziglang, it needs its own libraries only once.
os.environ.setdefault("ZIG_GLOBAL_CACHE_DIR", str(Path.home() / ".cache" / "zig"))

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

# Triton reads it when it is imported, which several tests do: without a GPU its interpreter runs the same code.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from sensorium import logger

# What a shell starts in the background ignores Ctrl-C, and so would the programs on which tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says how busy the machine is.
settings.register_profile("sensorium", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("sensorium")


@pytest.fixture(autouse=True)
def same_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a test independent of those before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  for libraries that draw from it
    torch.manual_seed(0)
    monkeypatch.setattr(logger, "_seen", set())


@pytest.fixture(autouse=True)
def same_log() -> Iterator[None]:
    """Take back how a command that ran in this process had its log written: to a stream that is the test's own."""
    loggers = [logging.getLogger(name) for name in ("sensorium", "uvicorn")]
    before = [(each.level, list(each.handlers)) for each in loggers]
    yield
    for each, (level, handlers) in zip(loggers, before, strict=True):
        each.setLevel(level)
        each.handlers[:] = handlers
