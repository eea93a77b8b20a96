"""`sensorium bench serve`."""

from __future__ import annotations

import argparse
import os

from sensorium.entrypoints.bench.load import Arrivals
from sensorium.entrypoints.bench.report import OutputArgs, finish
from sensorium.entrypoints.bench.serve import ServeBenchArgs, run_blocking
from sensorium.entrypoints.bench.workload import Workload
from sensorium.entrypoints.cli.flags import add_config, add_flags, build, read_settings

_KINDS = (ServeBenchArgs, Workload, Arrivals, OutputArgs)


def fill(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_config(parser)
    for kind in _KINDS:
        add_flags(parser, kind)
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Measure a server. Status 1 if no request succeeded."""
    values = read_settings(parsed)
    values.setdefault("api_key", os.environ.get("SENSORIUM_API_KEY"))
    args, workload, output = build(ServeBenchArgs, values), build(Workload, values), build(OutputArgs, values)
    bench = run_blocking(args, workload, build(Arrivals, values))
    finish(bench.figures, output, bench.panels)
    return 0 if bench.figures["completed"] else 1
