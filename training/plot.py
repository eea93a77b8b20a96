"""The loss curve of a run as an SVG file: ``python -m training.plot LOG.jsonl CURVE.svg``."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

_WIDTH, _HEIGHT, _MARGIN = 640, 320, 48
_DECADES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def curve(records: list[tuple[int, float]]) -> str:
    """An SVG document with loss (logarithmic) over steps; ``records`` are (step, loss)."""
    last = max(step for step, _ in records)
    low = max((tick for tick in _DECADES if tick <= min(loss for _, loss in records)), default=_DECADES[0])
    high = min((tick for tick in _DECADES if tick >= max(loss for _, loss in records)), default=_DECADES[-1])

    def x(step: float) -> float:
        return _MARGIN + (_WIDTH - 1.5 * _MARGIN) * step / last

    def y(loss: float) -> float:
        share = (math.log(loss) - math.log(low)) / (math.log(high) - math.log(low))
        return _HEIGHT - _MARGIN - (_HEIGHT - 1.5 * _MARGIN) * share

    points = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in records)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
    ]
    for tick in (tick for tick in _DECADES if low <= tick <= high):
        height = f"{y(tick):.1f}"
        parts.append(f'<path d="M{_MARGIN} {height} H{_WIDTH - _MARGIN // 2}" stroke="#ddd"/>')
        parts.append(f'<text x="{_MARGIN - 6}" y="{height}" text-anchor="end" font-size="12" dy="4">{tick:g}</text>')
    foot = _HEIGHT - _MARGIN + 18
    for quarter in range(5):
        step = last * quarter / 4
        parts.append(f'<text x="{x(step):.1f}" y="{foot}" text-anchor="middle" font-size="12">{step:.0f}</text>')
    parts += [
        f'<polyline points="{points}" fill="none" stroke="#1f77b4" stroke-width="1.5"/>',
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 8}" text-anchor="middle" font-size="13">step</text>',
        f'<text x="{_MARGIN}" y="16" font-size="13">loss per answer token</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Draw the curve of a log."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("log", type=Path)
    parser.add_argument("svg", type=Path)
    arguments = parser.parse_args()
    records = [json.loads(line) for line in arguments.log.read_text().splitlines()]
    arguments.svg.write_text(curve([(record["step"], record["loss"]) for record in records]))


if __name__ == "__main__":
    main()
