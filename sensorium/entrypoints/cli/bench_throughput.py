"""`sensorium bench throughput MODEL`: how much a model in this process does in a while."""

from __future__ import annotations

import argparse

from sensorium.entrypoints.bench.offline import throughput
from sensorium.entrypoints.cli.bench_offline import fill_offline, run_offline


def fill(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    fill_offline(parser, leave_out=["batch_size"])
    parser.set_defaults(run=lambda parsed: run_offline(parsed, throughput))
