"""The front's warm-up maps one small item of each modality that the model takes, and never fails."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sensorium.inputs.warm_up import warm_up

CONFIG: Any = SimpleNamespace(model_class=object)


class Registry:
    """One whose model takes pictures and sounds, clips by its limits only, and no more odours."""

    def __init__(self, error: Exception | None = None) -> None:
        self.mapped: list[str] = []
        self._error = error

    def get_mm_limits_per_prompt(self, model_config: object) -> dict[str, int]:
        return {"odour": 1, "image": 2, "video": 1, "audio": 1}

    def get_plugin(self, modality: str) -> Any:
        return SimpleNamespace(has_input_mapper=lambda model_class: modality != "video")

    def map_input(self, model_config: object, data: dict[str, Any]) -> None:
        self.mapped.extend(data)
        if self._error is not None:
            raise self._error


@pytest.mark.parametrize("error", [None, ValueError("too small"), KeyError("x")])
def test_each_modality_is_mapped_once_whatever_comes_of_it(error: Exception | None) -> None:
    registry: Any = Registry(error)
    warm_up(CONFIG, registry)
    assert registry.mapped == ["image", "audio"]
