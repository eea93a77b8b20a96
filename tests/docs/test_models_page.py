"""docs/models.md is what `sensorium models` shows, for the versions that it was made with."""

from __future__ import annotations

import importlib.metadata
import json

import pytest

from scripts import make_docs
from sensorium.entrypoints import model_table
from sensorium.entrypoints.cli.main import main
from sensorium.model_executor.models.registry import IN_TREE


def test_the_page_is_what_the_table_says() -> None:
    made_with = model_table.recorded()["versions"]["transformers"]
    if importlib.metadata.version("transformers") != made_with:
        pytest.skip(f"another transformers has other architectures; the page was made with {made_with}")
    assert make_docs.MODELS_PAGE.read_text() == make_docs.models_page(), "run: python -m scripts.make_docs"


def test_every_architecture_has_one_row_and_one_way() -> None:
    table = model_table.rows()
    names = [row.architecture for row in table]
    assert len(names) == len(set(names))
    assert set(IN_TREE) <= {row.architecture for row in table if row.way == model_table.NATIVE}
    assert sum(model_table.counts(table).values()) == len(table)


def test_what_is_recorded_as_flat_and_equal_is_most_of_the_text_architectures() -> None:
    found = model_table.counts(model_table.rows())
    assert found[model_table.FLAT] >= 80
    assert found[model_table.BY_REQUEST] >= 30


def test_media_of_many_architectures_are_recorded_as_equal() -> None:
    """Those of `media` were compared; one without is of text, or was not tried."""
    recorded = [each for each in model_table.recorded()["architectures"].values() if each.get("media")]
    assert all(each["is_equal"] for each in recorded)
    assert len(recorded) >= 45
    assert sum(each["tier"] == "flat" for each in recorded) >= 38


def test_the_command_shows_rows_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "olmoe", "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert (row["architecture"], row["way"], row["is_verified"]) == ("OlmoeForCausalLM", "flat", True)
    assert main(["models", "nobodys"]) == 1
