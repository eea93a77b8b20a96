"""`sensorium chat`: a conversation in the terminal, with a model of this process or with a server."""

from __future__ import annotations

import argparse
import os
from typing import Any

from sensorium import logger as package_logger
from sensorium.engine.args import EngineArgs
from sensorium.entrypoints.cli.flags import add_config, add_flags, add_model, build, read_settings
from sensorium.entrypoints.cli.generate import NO_FLAG, OF_PARSED_ANSWERS
from sensorium.errors import InvalidRequestError
from sensorium.media.limits import MediaLimits
from sensorium.sampling_params import SamplingParams

_NO_FLAG = (*NO_FLAG, "n")
_DEFAULTS = {"max_tokens": None}
"""An answer may fill the context."""


def fill(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_model(parser, 'a directory, a name on the model hub, or "demo"; with --url its name there')
    parser.add_argument("--url", metavar="URL", help="a server to ask instead of loading a model here")
    parser.add_argument("--api-key", metavar="KEY", help="for the server; the variable SENSORIUM_API_KEY by default")
    parser.add_argument("--system", metavar="TEXT", help="system text")
    add_config(parser)
    add_flags(parser, SamplingParams, leave_out=_NO_FLAG, defaults=_DEFAULTS)
    add_flags(parser, EngineArgs, leave_out=["model", "seed", *OF_PARSED_ANSWERS, "allowed_local_media_path"])
    add_flags(parser, MediaLimits)
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Chat until the user leaves."""
    values = read_settings(parsed)
    sampling = {name: values[name] for name in _sampling_names() if name in values}
    SamplingParams(**{**_DEFAULTS, **sampling})  # raises errors in the settings before anything is loaded
    limits = build(MediaLimits, values)
    engine_values = {name: values[name] for name in values.keys() & EngineArgs.__dataclass_fields__.keys() - {"seed"}}
    media_values = values.keys() & MediaLimits.__dataclass_fields__.keys()
    if parsed.url and (unused := sorted((engine_values.keys() | media_values) - {"model"})):
        raise InvalidRequestError(
            f"got a server and the engine's settings {unused}, expected one of both. Leave one out.", field="url"
        )
    if parsed.api_key and not parsed.url:
        raise InvalidRequestError(
            "got a key without a server, expected none. Set --url, or leave it out.", field="api_key"
        )
    package_logger.configure(package_logger.LogSettings("WARNING"))
    from sensorium.entrypoints.chat.answers import LoopThread
    from sensorium.entrypoints.chat.backends import LocalBackend, RemoteBackend
    from sensorium.entrypoints.chat.session import ChatSession
    from sensorium.entrypoints.chat.terminal import Terminal

    loop = LoopThread()
    try:
        if parsed.url:
            key = parsed.api_key or os.environ.get("SENSORIUM_API_KEY")
            backend: Any = loop.call(RemoteBackend.start(parsed.url, key, values.get("model"), sampling))
        else:
            engine_args = EngineArgs(**{"model": "demo", **engine_values})
            backend = loop.call(LocalBackend.start(engine_args, limits, sampling))
        try:
            return ChatSession(loop, backend, Terminal(), parsed.system).run()
        finally:
            loop.call(backend.close())
    finally:
        loop.close()


def _sampling_names() -> list[str]:
    return [name for name in SamplingParams.__dataclass_fields__ if name not in _NO_FLAG]
