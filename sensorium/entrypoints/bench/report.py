"""How a benchmark ends: a table for people, files if asked for, and one line of JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

from sensorium.entrypoints.bench import chart
from sensorium.entrypoints.bench.chart import Panel
from sensorium.errors import ConfigError
from sensorium.settings import FileName, check_settings


@dataclass(frozen=True, kw_only=True)
class OutputArgs:
    """Where the figures go, beside standard output."""

    json: Annotated[str, FileName()] | None = None
    """File for the figures; the last line of the output holds the same."""
    chart: Annotated[str, FileName()] | None = None
    """File for a chart: .html needs nothing, .png needs sensorium[bench]."""
    label: str = ""
    """A name for this run, kept in the figures."""

    def __post_init__(self) -> None:
        check_settings(self)
        if self.chart is not None:
            chart.check_path(self.chart)
        for name in ("json", "chart"):
            path = getattr(self, name)
            if path is not None and not Path(path).absolute().parent.is_dir():
                raise ConfigError(f"{name}: got {path!r}, expected a file in a folder that exists. Set {name}.")


def finish(figures: Mapping[str, Any], output: OutputArgs, panels: Sequence[Panel | None] = ()) -> None:
    """Print and write the figures. Raises `ConfigError` if a file can't be written."""
    figures = {**({"label": output.label} if output.label else {}), **figures}
    line = json.dumps(figures)
    try:
        if output.json is not None:
            Path(output.json).write_text(line + "\n", encoding="utf-8")
        if output.chart is not None:
            title = output.label or f"sensorium bench {figures.get('benchmark', '')}"
            chart.write(output.chart, title, [panel for panel in panels if panel is not None], rows(figures))
    except OSError as error:
        raise ConfigError(f"output: got {type(error).__name__} on {error.filename!r}, expected to write it.") from error
    shown = rows({name: value for name, value in figures.items() if name != "settings"})
    width = max(len(name) for name, _ in shown)
    print("\n".join(f"{name:{width}}  {value}" for name, value in shown))
    print(line, flush=True)


def rows(figures: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Names and values for people; the percentiles of one quantity share a row."""
    found: list[tuple[str, str]] = []
    for name, value in figures.items():
        if isinstance(value, Mapping) and not _is_spread(value):
            found += rows(value, f"{prefix}{name}.")
        elif isinstance(value, Mapping):
            found.append((prefix + name, "  ".join(f"{key} {each:.6g}" for key, each in value.items())))
        elif value not in (None, [], ""):
            found.append((prefix + name, " ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return found


def _is_spread(value: Mapping[str, Any]) -> bool:
    return "p50" in value


def plain(settings: Any) -> dict[str, Any]:
    """The settings of a dataclass as JSON has them, without those that are None."""
    assert is_dataclass(settings)
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    return {name: _plain_value(value) for name, value in values.items() if value is not None}


def _plain_value(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain_value(each) for each in value]
    return value if isinstance(value, int | float | str | bool) else str(value)
