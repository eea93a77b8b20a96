"""docs/settings.md is what scripts/make_docs.py makes of the settings' classes as they are."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields

import pytest

from scripts import make_docs
from sensorium.engine.args import EngineArgs
from sensorium.entrypoints.cli import serve
from sensorium.entrypoints.openai.server_args import ServerArgs
from sensorium.media.limits import MediaLimits


def test_the_page_is_up_to_date() -> None:
    assert make_docs.PAGE.read_text() == make_docs.page(), "run: python -m scripts.make_docs"


@pytest.mark.parametrize("kind", [EngineArgs, ServerArgs, MediaLimits])
def test_every_field_has_a_row_with_a_description(kind: type) -> None:
    rows = dict(re.findall(r"^\| `(\w+)` .* \| ([^|]+) \|$", make_docs.page(), re.MULTILINE))
    for field in fields(kind):
        assert len(rows[field.name]) > 10, field.name


def test_the_flags_on_the_page_are_those_of_the_server() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    serve.fill(parser)
    taken = {flag for action in parser._actions for flag in action.option_strings} - {"--config"}
    tables = "\n".join(line for kind in make_docs.SECTIONS for line in make_docs.rows(kind))
    assert set(re.findall(r"(?<=[ |])`(--[\w-]+)`", tables)) == taken


def test_defaults_are_shown_as_people_say_them() -> None:
    assert [make_docs.size(each) for each in (1 << 30, 3 << 29, 64 << 20)] == ["1 GiB", "1536 MiB", "64 MiB"]
