"""Plug-ins leave modules, a folder of the path, finders and models behind; here they don't."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sensorium import ModelRegistry
from tests.helpers.release_of_vllm import NotFetchedError, fetch_model_files

RELEASE = "0.6.4.post1"


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(ModelRegistry, "_models", dict(ModelRegistry._models))
    yield
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture(scope="module")
def released(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model files of the release, kept from run to run where pytest keeps something."""
    cache = getattr(request.config, "cache", None)
    kept = tmp_path_factory.mktemp("release") if cache is None else cache.mkdir("release_of_vllm")
    try:
        return fetch_model_files(RELEASE, kept)
    except NotFetchedError as error:
        pytest.skip(f"the source of vllm {RELEASE} could not be fetched from the package index: {error}")
