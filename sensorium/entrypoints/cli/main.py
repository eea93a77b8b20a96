"""The `sensorium` command: finds the subcommand and reports errors in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import sensorium
from sensorium.entrypoints.cli import serve
from sensorium.errors import SensoriumError


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser("sensorium", description="Serve multimodal models.")
    parser.add_argument("--version", action="version", version=sensorium.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parsed = make_parser().parse_args(arguments)
    try:
        status: int = parsed.run(parsed)
    except SensoriumError as error:
        print(f"sensorium: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
