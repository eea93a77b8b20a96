"""`sensorium run-batch MODEL -i requests.jsonl -o answers.jsonl`."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from sensorium import logger as package_logger
from sensorium.engine.args import EngineArgs
from sensorium.entrypoints.cli.flags import add_config, add_flags, add_model, build, read_settings
from sensorium.entrypoints.openai.preflight import check_settings
from sensorium.entrypoints.openai.server_args import ServerArgs
from sensorium.errors import ConfigError
from sensorium.media.limits import MediaLimits

_KINDS = (ServerArgs, EngineArgs, MediaLimits)
_OF_THE_NETWORK = (
    *("host", "port", "api_key", "allowed_origin", "allowed_host", "ssl_certfile", "ssl_keyfile", "drain_s"),
    *("max_connections", "max_waiting_bytes", "handshake_timeout_s", "head_timeout_s", "body_timeout_s"),
    *("min_body_bytes", "read_timeout_s", "keep_alive_s"),
)
_UNBOUNDED = 1 << 62


def fill(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_model(parser)
    parser.add_argument(
        "-i", "--input", required=True, metavar="FILE", help="requests, one a line; - for standard input"
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help="answers; a run that was cut off goes on here; - for output",
    )
    parser.add_argument("--concurrency", type=int, metavar="INT", help="requests in flight [twice max_num_seqs]")
    parser.add_argument("--retry-failed", action="store_true", help="ask again what an earlier run got errors for")
    add_config(parser)
    for kind in _KINDS:
        add_flags(parser, kind, leave_out=["model", *_OF_THE_NETWORK], defaults={"log_level": "WARNING"})
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Answer a file of requests. Status 1 if any of them failed."""
    values = {"model": "demo", "log_level": "WARNING", **read_settings(parsed)}
    engine_args, limits = build(EngineArgs, values), build(MediaLimits, values)
    # What is in flight is bounded by its number.
    server_args = build(ServerArgs, {**values, "max_waiting_bytes": _UNBOUNDED})
    concurrency = parsed.concurrency or 2 * engine_args.max_num_seqs
    if concurrency < 1:
        raise ConfigError(f"concurrency: got {concurrency}, expected at least 1. Set concurrency.")
    if parsed.output != "-" and parsed.input != "-" and Path(parsed.input).resolve() == Path(parsed.output).resolve():
        raise ConfigError(f"output: got {parsed.output!r}, which is the input, expected another file. Set it.")
    package_logger.configure(server_args.log_settings)
    check_settings("sensorium run-batch", engine_args, server_args)
    return asyncio.run(_run(parsed, engine_args, server_args, limits, concurrency))


async def _run(
    parsed: argparse.Namespace, engine_args: EngineArgs, args: ServerArgs, limits: MediaLimits, concurrency: int
) -> int:
    from sensorium.entrypoints.batch.input_file import BatchInput
    from sensorium.entrypoints.batch.output_file import BatchOutput

    start_s = time.monotonic()
    with (
        BatchInput(parsed.input, max_line_bytes=args.max_body_bytes) as lines,
        BatchOutput(None if parsed.output == "-" else parsed.output, retry_failed=parsed.retry_failed) as output,
    ):
        from sensorium.entrypoints.batch.runner import BatchRunner, progress_bar  # loads the server's libraries
        from sensorium.entrypoints.openai.server import make_media_loader, running_app

        engine_args = replace(engine_args, max_waiting_requests=_UNBOUNDED)
        async with running_app(engine_args, replace(args, drain_s=0.0), limits) as (app, engine):
            bar: Any = None
            progress = None
            if sys.stderr.isatty():
                bar, progress = progress_bar(lines.num_lines)
            with closing(bar) if bar is not None else nullcontext():
                runner = BatchRunner(
                    app,
                    engine,
                    make_media_loader(engine_args, args, limits),
                    output,
                    concurrency=concurrency,
                    max_line_bytes=args.max_body_bytes,
                    progress=progress,
                )
                counts = await runner.run(iter(lines))
    print(
        f"{counts.answered} answered, {counts.failed} failed, {counts.skipped} done before, "
        f"in {time.monotonic() - start_s:.1f} s",
        file=sys.stderr,
    )
    return 1 if counts.failed else 0
