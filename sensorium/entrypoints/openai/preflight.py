"""Checks a server's settings as far as possible before a model is loaded.

Imports neither torch nor the server's libraries, so that errors appear at once.
"""

from __future__ import annotations

from sensorium.engine.args import EngineArgs
from sensorium.engine.resolution import check_files
from sensorium.entrypoints.extras import require
from sensorium.entrypoints.openai.listening import check_certificate
from sensorium.entrypoints.openai.server_args import ServerArgs
from sensorium.errors import ConfigError
from sensorium.media.policy import FetchPolicy


def check_settings(command: str, engine_args: EngineArgs, args: ServerArgs) -> None:
    """Return if no mistake is found.

    Args:
        command: what was asked for, for the message about a missing extra.

    Raises:
        ConfigError: There is a mistake.
    """
    require("serve", command)
    if args.otlp_traces_endpoint is not None:
        require("tracing", f"otlp_traces_endpoint: got {args.otlp_traces_endpoint!r}, which")
    check_certificate(args)
    fetch_policy(engine_args, args)
    check_files(engine_args)
    for name in engine_args.lora_modules.keys() & set(args.served_model_name or (engine_args.model,)):
        raise ConfigError(
            f"lora_modules: got the name {name!r:.120}, which is the model's in requests, expected another. Change it, "
            "or set served_model_name (--served-model-name)."
        )


def fetch_policy(engine_args: EngineArgs, args: ServerArgs) -> FetchPolicy:
    """The policy for media sources in requests. Raises `ConfigError`."""
    return FetchPolicy(
        allow_remote=args.allow_remote_media,
        allowed_hosts=args.allowed_media_host,
        allowed_networks=args.allowed_media_network,
        allowed_local_media_path=engine_args.allowed_local_media_path,
    )
