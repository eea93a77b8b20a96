"""`sensorium serve MODEL`."""

from __future__ import annotations

import argparse
import asyncio

from sensorium import logger as package_logger
from sensorium.engine.args import EngineArgs
from sensorium.entrypoints.cli.flags import add_config, add_flags, add_model, build, read_settings
from sensorium.entrypoints.openai.listening import listening
from sensorium.entrypoints.openai.preflight import check_settings
from sensorium.entrypoints.openai.server_args import ServerArgs
from sensorium.media.limits import MediaLimits

_KINDS = (ServerArgs, EngineArgs, MediaLimits)


def fill(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_model(parser)
    add_config(parser)
    for kind in _KINDS:
        add_flags(parser, kind, leave_out=["model"])
    parser.set_defaults(run=run)


def settings(parsed: argparse.Namespace) -> tuple[EngineArgs, ServerArgs, MediaLimits]:
    """The three kinds of settings, from the config file and the flags.

    Raises:
        ConfigError: A value can't be used.
    """
    values = read_settings(parsed)
    return build(EngineArgs, {"model": "demo", **values}), build(ServerArgs, values), build(MediaLimits, values)


def run(parsed: argparse.Namespace) -> int:
    """Serve until stopped."""
    engine_args, server_args, limits = settings(parsed)
    package_logger.configure(server_args.log_settings)
    for library in ("uvicorn", "asyncio"):
        package_logger.configure(server_args.log_settings, library)
    check_settings("sensorium serve", engine_args, server_args)
    with listening(server_args) as sockets:
        from sensorium.entrypoints.openai.server import serve  # loads the server's libraries and torch

        return asyncio.run(serve(engine_args, server_args, limits, sockets))
