"""Charts of a run: as one HTML page that needs nothing else, or as PNG by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sensorium.entrypoints.bench.page import page
from sensorium.entrypoints.extras import require
from sensorium.errors import ConfigError

_MAX_POINTS = 240
_LOG_RATIO = 30.0
"""From this ratio between the largest and the smallest value on, the axis is logarithmic."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One line over an axis. Points rise in x."""

    title: str
    x_label: str
    y_label: str
    points: list[tuple[float, float]]

    @property
    def is_log(self) -> bool:
        """Whether the x axis is logarithmic."""
        low, high = self.points[0][0], self.points[-1][0]
        return low > 0 and high / low > _LOG_RATIO


def share_below(title: str, values_s: Sequence[float]) -> Panel | None:
    """The cumulative distribution of values in milliseconds; None without values."""
    ordered = sorted(values_s)
    if not ordered:
        return None
    step = max(1, len(ordered) // _MAX_POINTS)
    kept = [*range(0, len(ordered) - 1, step), len(ordered) - 1]
    points = [(ordered[index] * 1e3, 100 * (index + 1) / len(ordered)) for index in kept]
    return Panel(title, "milliseconds", "% at most", points)


def in_order(title: str, y_label: str, values: Sequence[float]) -> Panel | None:
    """Values in the order in which they were measured; None without values."""
    points = [(index + 1.0, value) for index, value in enumerate(values)]
    return Panel(title, "repetition", y_label, points) if points else None


def check_path(path: str) -> None:
    """Refuse a file that `write` could not write, before anything is measured. Raises `ConfigError`."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".html", ".png"):
        raise ConfigError(f"chart: got {path!r}, expected a name that ends in .html or .png. Set chart.")
    if suffix == ".png":
        require("bench", f"chart: got {path!r}, which")


def write(path: str, title: str, panels: Sequence[Panel], rows: Sequence[tuple[str, str]]) -> None:
    """Write panels, and on a page a table of figures below them. Raises `ConfigError`."""
    if Path(path).suffix.lower() == ".png":
        _write_png(path, title, panels)
    else:
        Path(path).write_text(page(title, panels, rows), encoding="utf-8")


def _write_png(path: str, title: str, panels: Sequence[Panel]) -> None:
    from matplotlib.figure import Figure

    columns = min(2, len(panels)) or 1
    rows = math.ceil(len(panels) / columns) or 1
    figure = Figure(figsize=(5.5 * columns, 3.2 * rows), layout="constrained")
    figure.suptitle(title)
    for number, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, number)
        axes.plot(*zip(*panel.points, strict=True), marker="." if len(panel.points) < 20 else None)
        axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label, ylim=(0, None))
        axes.set_xscale("log" if panel.is_log else "linear")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
