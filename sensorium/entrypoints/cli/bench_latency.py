"""`sensorium bench latency MODEL`: how long a model in this process takes for one batch."""

from __future__ import annotations

import argparse

from sensorium.entrypoints.bench.offline import latency
from sensorium.entrypoints.cli.bench_offline import fill_offline, run_offline


def fill(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    fill_offline(parser, leave_out=["num_requests"])
    parser.set_defaults(run=lambda parsed: run_offline(parsed, latency))
