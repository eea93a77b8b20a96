"""`sensorium models`: which architectures run, and how."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict


def fill(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("names", nargs="*", help="only architectures whose names hold one of these")
    parser.add_argument("--json", action="store_true", help="as one JSON list")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Print the table. Status 1 if it is empty."""
    from sensorium.entrypoints import model_table  # loads transformers
    from sensorium.model_executor.models.registry import ModelRegistry
    from sensorium.plugins import load_general_plugins

    load_general_plugins()
    wanted = [name.lower() for name in parsed.names]
    table = model_table.rows(ModelRegistry.get_supported_archs())
    rows = [row for row in table if not wanted or any(name in row.architecture.lower() for name in wanted)]
    if parsed.json:
        print(json.dumps([asdict(row) for row in rows]))
    elif rows:
        print("\n".join(model_table.lines(rows)))
    else:
        print("no such architecture")
    return 0 if rows else 1
