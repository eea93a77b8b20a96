"""Writes docs/settings.md from the fields of the settings' classes, and docs/models.md from the table of models.

    python -m scripts.make_docs

Tests fail while a page and what it is made of differ.
"""

from __future__ import annotations

import argparse
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from scripts.wrap import wrap
from sensorium.engine.args import EngineArgs
from sensorium.entrypoints import model_table
from sensorium.entrypoints.cli.flags import field_docs
from sensorium.entrypoints.openai.server_args import ServerArgs
from sensorium.media.limits import MediaLimits
from sensorium.settings import FieldType, field_type_of, flag_of

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
MODELS_PAGE = PAGE.with_name("models.md")

INTRODUCTION = """\
# Settings

Made by `python -m scripts.make_docs` from the fields' own descriptions; don't edit it by hand.

Every setting has a flag, and a name that is the same in Python and in the YAML file of `--config`; flags win over the
file. All are checked before anything is loaded: a value that can't be used is an error that names its setting. Where no
default is given, the description says what happens. [Serving](serving.md) and [Operations](operations.md) say what to
set when, and `--help` of each [command](commands.md) which settings it has, with defaults of its own where they differ.
"""

SECTIONS: Mapping[type, tuple[str, str]] = {
    EngineArgs: (
        "The engine",
        (
            "Flags of every command that loads a model, fields of `EngineArgs`, and keywords of `LLM`, where "
            "`max_token_gap_s` is infinite by default, because nothing is streamed."
        ),
    ),
    ServerArgs: ("The server", "Flags of `sensorium serve`."),
    MediaLimits: (
        "Media",
        (
            "Budgets of one item unless the name says otherwise: flags of the commands that take media, and fields of "
            "`MediaLimits`, which `LLM` takes as `media_limits`. All must be more than 0, but for `max_redirects` and "
            "`max_decoded_cache_bytes`."
        ),
    ),
}
_NAMES = {str: "text", int: "whole number", float: "number"}
_UNITS = {30: "GiB", 20: "MiB", 10: "KiB"}


def page() -> str:
    """The whole page."""
    sections = (
        f"\n## {title}\n\n{text}\n\n" + "\n".join(rows(kind)) + "\n" for kind, (title, text) in SECTIONS.items()
    )
    return wrap(INTRODUCTION + "".join(sections))


def rows(kind: type) -> Iterator[str]:
    """The lines of one class's table."""
    yield "| setting | flag | takes | default | what |"
    yield "|---|---|---|---|---|"
    hints, helps = typing.get_type_hints(kind, include_extras=True), field_docs(kind)
    for field in fields(kind):
        field_type = field_type_of(hints[field.name])
        text = helps[field.name][0].upper() + helps[field.name][1:]
        cells = (f"`{field.name}`", flags(field, field_type), takes(field_type), default(field, field_type), text)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def flags(field: Field[Any], field_type: FieldType) -> str:
    """How a field is set on the command line."""
    if field.name == "model":
        return "first argument"
    flag = flag_of(field.metadata.get("flag", field.name))
    return f"`{flag}`, `{flag.replace('--', '--no-', 1)}`" if field_type.kind is bool else f"`{flag}`"


def takes(field_type: FieldType) -> str:
    """What a field's value may be, in a few words."""
    if field_type.choices:
        return ", ".join(f"`{choice}`" for choice in field_type.choices)
    if field_type.kind is bool:
        return "true or false"
    origin = typing.get_origin(field_type.kind)
    if origin is not None:
        (*_, inner) = [each for each in typing.get_args(field_type.kind) if each is not ...]
        if issubclass(origin, Mapping):
            if field_type_of(inner).kind is str:
                return "names and texts, `name=text`"
            return "JSON object" if inner is Any else f"JSON object of values: {takes(field_type_of(inner))}"
        assert issubclass(origin, Sequence)
        return f"{takes(field_type_of(inner))}, may be repeated"
    bounds = [str(each) for each in field_type.bounds if each.low > -(2**62)]  # a seed may be any integer
    return ", ".join([_NAMES[field_type.kind], *bounds])


def default(field: Field[Any], field_type: FieldType) -> str:
    """A field's default; empty if there is none, or if the description says it."""
    value = field.default
    if value is MISSING or value is None or value == ():
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if "bytes" in field.name:
        return f"{value} ({size(value)})"
    return f"`{value}`" if field_type.kind is str or field_type.choices else str(value)


def size(num_bytes: int) -> str:
    """Bytes in the largest binary unit that divides them."""
    power = next(power for power in _UNITS if num_bytes % (1 << power) == 0)
    return f"{num_bytes >> power} {_UNITS[power]}"


def models_page() -> str:
    """The whole page of models."""
    return wrap(model_table.markdown(model_table.rows()))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(page(), encoding="utf-8")
    MODELS_PAGE.write_text(models_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
