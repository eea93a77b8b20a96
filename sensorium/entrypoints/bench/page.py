"""An HTML page with charts in SVG and a table: one file, no script, light and dark, readable without the pictures."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sensorium.entrypoints.bench.chart import Panel

_WIDTH, _HEIGHT = 460, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 16, 12, 44
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #5b6472; --rule: #d9dde3; --line: #0b63ce; --ground: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaee; --soft: #a4acb8; --rule: #3a414c; --line: #6cb0ff; --ground: #14171c; }
}
body { margin: 2rem auto; max-width: 62rem; padding: 0 1rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin: 0 0 .3rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1.5rem; }
figure { margin: 0; } svg { width: 100%; height: auto; } text { fill: var(--soft); font-size: 12px; }
.rule { stroke: var(--rule); } .line { stroke: var(--line); stroke-width: 2; fill: none; } .dot { fill: var(--line); }
table { border-collapse: collapse; margin-top: 1.5rem; } th, td { text-align: left; padding: .2rem 1.5rem .2rem 0;
  border-bottom: 1px solid var(--rule); } td { font-variant-numeric: tabular-nums; }
"""


def page(title: str, panels: Sequence[Panel], rows: Sequence[tuple[str, str]]) -> str:
    """The page. `rows` are names and values."""
    charts = "\n".join(_figure(panel, number) for number, panel in enumerate(panels))
    table = "\n".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(value)}</td></tr>' for name, value in rows
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n<h1>{html.escape(title)}</h1>\n"
        f'<div class="charts">\n{charts}\n</div>\n<table><caption>Figures</caption>\n{table}\n</table>\n</html>\n'
    )


def _figure(panel: Panel, number: int) -> str:
    (low, _), (high, _) = panel.points[0], panel.points[-1]
    top = _round_up(max(y for _, y in panel.points))
    ticks = _log_ticks(low, high) if panel.is_log else _ticks(min(low, 0.0), high)
    place_x = _scale(ticks[0], ticks[-1], _LEFT, _WIDTH - _RIGHT, is_log=panel.is_log)
    place_y = _scale(0.0, top, _HEIGHT - _BOTTOM, _TOP)
    corners = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in panel.points)
    dots = "".join(f'<circle class="dot" cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="3"/>' for x, y in panel.points)
    described = f"{panel.y_label} over {panel.x_label}, from {low:.4g} to {high:.4g}."
    return (
        f"<figure><figcaption><h2>{html.escape(panel.title)}</h2></figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-labelledby="d{number}"><desc id="d{number}">'
        f"{html.escape(f'{panel.title}: {described}')}</desc>"
        f"{_grid(panel, ticks, _ticks(0.0, top), place_x, place_y)}"
        f'<polyline class="line" points="{corners}"/>{dots if len(panel.points) < 20 else ""}</svg></figure>'
    )


_Place = Callable[[float], float]


def _grid(panel: Panel, x_ticks: Sequence[float], y_ticks: Sequence[float], place_x: _Place, place_y: _Place) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for y in y_ticks:
        parts.append(f'<line class="rule" x1="{_LEFT}" x2="{right}" y1="{place_y(y):.1f}" y2="{place_y(y):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{place_y(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in x_ticks:
        parts.append(f'<line class="rule" x1="{place_x(x):.1f}" x2="{place_x(x):.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{place_x(x):.1f}" y="{bottom + 16}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text x="{right}" y="{_HEIGHT - 8}" text-anchor="end">{html.escape(panel.x_label)}</text>')
    parts.append(f'<text x="{_LEFT}" y="{_HEIGHT - 8}">{html.escape(panel.y_label)}</text>')
    return "".join(parts)


def _scale(low: float, high: float, start: float, end: float, *, is_log: bool = False) -> _Place:
    change = math.log if is_log else float
    first, width = change(low), (change(high) - change(low)) or 1.0
    return lambda value: start + (change(value) - first) / width * (end - start)


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers of which the first and last enclose the values: 0 and 7.3 give 0, 1, ... 8."""
    step = _round_up(max(high - low, 1e-9) / 8)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(index * step, 9) for index in range(first, max(last, first + 1) + 1)]


def _round_up(value: float) -> float:
    """The next number of 1, 2, 5, 10, 20, 50 and so on: 0.03 gives 0.05."""
    if value <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    return next(unit * factor for factor in (1, 2, 5, 10) if value <= unit * factor * (1 + 1e-9))


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that enclose the values."""
    return [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
