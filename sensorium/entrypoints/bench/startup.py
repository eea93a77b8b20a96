"""How long a fresh process takes to be ready, and to its first token."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from sensorium.config import Count
from sensorium.entrypoints.bench.chart import Panel, in_order
from sensorium.entrypoints.bench.stats import spread_ms
from sensorium.errors import ConfigError
from sensorium.settings import Bounds, check_settings

_PROBE = "sensorium.entrypoints.bench.startup_probe"


@dataclass(frozen=True, kw_only=True)
class StartupBenchArgs:
    """How starting is measured."""

    repeats: Count = 3
    """Fresh processes, one after the other. The first may find cold files and kernels that have to be compiled."""
    timeout_s: Annotated[float, Bounds(0, above=True)] = 600.0
    """Bound on one start."""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, slots=True)
class Start:
    """One start, in seconds from the creation of the process."""

    imported_s: float
    """The package's libraries are loaded."""
    ready_s: float
    """Prompts are taken."""
    first_token_s: float
    stages: dict[str, float]
    """The time of loading, as the load report has it."""


def startup(
    model: str, settings: Mapping[str, Any], args: StartupBenchArgs
) -> tuple[dict[str, Any], list[Panel | None]]:
    """Start `repeats` times. Raises `ConfigError` with the process's last output if it can't."""
    starts = [measure(model, settings, args.timeout_s) for _ in range(args.repeats)]
    figures = {
        "benchmark": "startup",
        "model": model,
        "repeats": args.repeats,
        **{
            f"{name}_ms": spread_ms(getattr(start, f"{name}_s") for start in starts)
            for name in ("imported", "ready", "first_token")
        },
        "stages_s": {name: round(seconds, 3) for name, seconds in starts[-1].stages.items()},
        "settings": dict(settings),
    }
    return figures, [
        in_order("Ready", "seconds", [start.ready_s for start in starts]),
        in_order("First token", "seconds", [start.first_token_s for start in starts]),
    ]


def measure(model: str, settings: Mapping[str, Any], timeout_s: float) -> Start:
    """One start."""
    given = json.dumps({"model": model, **settings})
    start_s = time.time()
    try:
        done = subprocess.run(
            [sys.executable, "-m", _PROBE], input=given, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"timeout_s: got no first token within {timeout_s:g} s. Raise timeout_s.") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"the model could not be started: {last}")
    found = json.loads(done.stdout.splitlines()[-1])
    times = {f"{name}_s": found[name] - start_s for name in ("imported", "ready", "first_token")}
    return Start(**times, stages=found["stages"])
