"""Fixtures that switch between the native kernels and their twins."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sensorium.kernels import native


@pytest.fixture
def native_kernels() -> None:
    """For tests that compare the native kernels with something: without them they would compare a twin with itself."""
    reason = native.native_refusal()
    if reason is not None:
        pytest.skip(f"no native kernels on this machine: {reason}")


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SENSORIUM_NATIVE", "0")
    native._load.cache_clear()
    yield
    monkeypatch.undo()
    native._load.cache_clear()


@pytest.fixture(params=[1, 3])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Results must not depend on how many threads share the work, also when there are more than cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=["tiles", "vectors"])
def tiles(request: pytest.FixtureRequest, native_kernels: None) -> Iterator[bool]:
    """Whether bfloat16 goes by the machine's matrix tiles. Where it has none, both runs go by vectors."""
    library = native.native_library()
    assert library is not None
    before = library.use_tiles(True)
    yield library.use_tiles(request.param == "tiles")
    library.use_tiles(before)
