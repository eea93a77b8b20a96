"""`sensorium bench startup MODEL`."""

from __future__ import annotations

import argparse

from sensorium.engine.args import EngineArgs
from sensorium.entrypoints.bench.report import OutputArgs, finish
from sensorium.entrypoints.bench.startup import StartupBenchArgs, startup
from sensorium.entrypoints.cli.flags import add_config, add_flags, add_model, build, read_settings

_KINDS = (StartupBenchArgs, OutputArgs, EngineArgs)


def fill(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_model(parser)
    add_config(parser)
    for kind in _KINDS:
        add_flags(parser, kind, leave_out=["model"])
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Measure and report."""
    values = {"model": "demo", **read_settings(parsed)}
    output, args = build(OutputArgs, values), build(StartupBenchArgs, values)
    build(EngineArgs, values)  # checked here, before processes are started
    model = values.pop("model")
    settings = {name: value for name, value in values.items() if name in EngineArgs.__dataclass_fields__}
    figures, panels = startup(model, settings, args)
    finish(figures, output, panels)
    return 0
