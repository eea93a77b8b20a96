"""`sensorium bench`: its own subcommands."""

from __future__ import annotations

import argparse

from sensorium.entrypoints.cli.main import add_commands

_HERE = "sensorium.entrypoints.cli"
_COMMANDS = {
    "serve": (f"{_HERE}.bench_serve", "load a server that speaks OpenAI's API, and report what its clients see"),
    "throughput": (f"{_HERE}.bench_throughput", "measure how much a model in this process does in a while"),
    "latency": (f"{_HERE}.bench_latency", "measure how long a model in this process takes for one batch"),
    "startup": (f"{_HERE}.bench_startup", "measure how long a fresh process takes to its first token"),
}


def fill(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands."""
    add_commands(parser, _COMMANDS)
