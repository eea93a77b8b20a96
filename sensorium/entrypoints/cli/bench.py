"""`sensorium bench`: its own subcommands."""

from __future__ import annotations

import argparse

from sensorium.entrypoints.cli.main import add_commands

_HERE = "sensorium.entrypoints.cli"
_COMMANDS = {
    "serve": (f"{_HERE}.bench_serve", "load a server that speaks OpenAI's API, and report what its clients see"),
}


def fill(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands."""
    add_commands(parser, _COMMANDS)
