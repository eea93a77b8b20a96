"""An engine in its caller's process leaves that as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from sensorium import LLM
from sensorium.errors import WeightsError
from sensorium.worker import process_settings, worker
from sensorium.worker.process_settings import ProcessSettings
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.direct import engine_config

SMALL: dict[str, Any] = {"device": "cpu", "num_blocks": 16, "max_model_len": 64}


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process of three threads that no engine of another test has settings in."""
    monkeypatch.setattr(worker, "PROCESS_SETTINGS", ProcessSettings())
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_an_llm_gives_its_callers_threads_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """`num_threads` stayed set for the rest of the process, and so did what the C library was told about memory."""
    given_back = []
    monkeypatch.setattr(process_settings, "give_back_freed_memory", lambda: given_back.append(True))
    path = str(make_checkpoint("llama"))
    one, two = LLM(path, num_threads=1, **SMALL), LLM(path, num_threads=2, **SMALL)
    assert torch.get_num_threads() == 2
    one.shutdown()
    one.shutdown()
    assert (torch.get_num_threads(), given_back) == (2, [])
    two.shutdown()
    assert torch.get_num_threads() == 3
    assert len(given_back) <= 1, "not where the C library can't be told"


@pytest.mark.usefixtures("three_threads")
def test_so_does_one_that_is_forgotten_and_one_that_never_loads() -> None:
    llm = LLM(str(make_checkpoint("llama")), num_threads=1, **SMALL)
    assert torch.get_num_threads() == 1
    del llm
    gc.collect()
    assert torch.get_num_threads() == 3
    with pytest.raises(WeightsError):
        LLM(str(make_checkpoint("llama")), num_threads=1, hf_overrides={"num_hidden_layers": 7}, **SMALL)
    gc.collect()
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("before", [True, False])
def test_float32_on_a_gpu_is_not_rounded_while_an_engine_runs(before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", before)
    settings = ProcessSettings()
    config = engine_config(make_checkpoint("llama"), dtype="float32")
    on_gpu = replace(config, device_config=replace(config.device_config, device="cuda"))
    settings.hold(on_gpu)
    settings.hold(on_gpu)
    assert torch.backends.cudnn.allow_tf32 is False
    settings.release()
    assert torch.backends.cudnn.allow_tf32 is False
    settings.release()
    assert torch.backends.cudnn.allow_tf32 is before
