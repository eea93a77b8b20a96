"""Code that `sensorium bench throughput` and `latency` share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from sensorium import logger as package_logger
from sensorium.engine.args import EngineArgs
from sensorium.entrypoints.bench.offline import OfflineBenchArgs
from sensorium.entrypoints.bench.report import OutputArgs, finish
from sensorium.entrypoints.bench.workload import Workload
from sensorium.entrypoints.cli.flags import add_config, add_flags, add_model, build, read_settings
from sensorium.media.limits import MediaLimits

_KINDS = (OfflineBenchArgs, Workload, OutputArgs, EngineArgs, MediaLimits)
Measure = Callable[..., tuple[dict[str, Any], list[Any]]]


def fill_offline(parser: argparse.ArgumentParser, *, leave_out: Sequence[str]) -> None:
    """Add the arguments of both, without those that one doesn't use."""
    add_model(parser)
    add_config(parser)
    for kind in _KINDS:
        own = ["model", "seed"] if kind is EngineArgs else leave_out  # the seed is the workload's
        add_flags(parser, kind, leave_out=own)


def run_offline(parsed: argparse.Namespace, measure: Measure) -> int:
    """Measure and report."""
    values = {"model": "demo", **read_settings(parsed)}
    output = build(OutputArgs, values)
    package_logger.configure(package_logger.LogSettings("WARNING"))
    figures, panels = measure(
        build(EngineArgs, values), build(MediaLimits, values), build(Workload, values), build(OfflineBenchArgs, values)
    )
    finish(figures, output, panels)
    return 0
