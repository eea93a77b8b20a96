"""From settings to a server that listens: engine, application, uvicorn; and an orderly end of all three."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import uvicorn
from starlette.applications import Starlette

from sensorium.chat.named_media import NamedMedia
from sensorium.chat.renderer import ChatRenderer
from sensorium.chat.template import plain_template
from sensorium.engine.args import EngineArgs
from sensorium.engine.async_llm_engine import AsyncLLMEngine
from sensorium.engine.core_process import CoreFactory
from sensorium.entrypoints.extras import require
from sensorium.entrypoints.openai.app import create_app
from sensorium.entrypoints.openai.connections import NUM_RESERVED
from sensorium.entrypoints.openai.context import ServerContext
from sensorium.entrypoints.openai.http_server import ACCEPTED_AT_ONCE, HttpServer
from sensorium.entrypoints.openai.listening import url_of
from sensorium.entrypoints.openai.metrics import ServerMetrics
from sensorium.entrypoints.openai.middleware import OnEnd
from sensorium.entrypoints.openai.preflight import fetch_policy
from sensorium.entrypoints.openai.responses.store import ResponseStore
from sensorium.entrypoints.openai.server_args import ServerArgs
from sensorium.entrypoints.openai.transcriptions import TranscriptionRoutes
from sensorium.errors import ConfigError
from sensorium.logger import get_logger
from sensorium.media import DecoderPool, MediaBudget, MediaLimits, MediaLoader

if TYPE_CHECKING:
    from sensorium.entrypoints.openai.tracing import Traces

logger = get_logger(__name__)

DEFAULT_MAX_WAITING_REQUESTS = 1024
_FILES_PER_CONNECTION = 2
"""A socket, and a segment of media on its way to the core."""
_OTHER_FILES = 16
"""The channel to the core, the event loop's own, and media on their way from other servers."""
_NUM_OTHER_THREADS = 8
"""Threads for what is no preprocessing: name look-ups, large bodies, chat templates. They mostly wait."""
_WATCH_INTERVAL_S = 0.2


@asynccontextmanager
async def running_app(
    engine_args: EngineArgs,
    args: ServerArgs | None = None,
    limits: MediaLimits | None = None,
    *,
    make_core: CoreFactory | None = None,
) -> AsyncIterator[tuple[Starlette, AsyncLLMEngine]]:
    """An engine and the application over it, for as long as the context lasts; see `AsyncLLMEngine.start`."""
    args = args or ServerArgs()
    if engine_args.max_waiting_requests is None:
        engine_args = replace(engine_args, max_waiting_requests=DEFAULT_MAX_WAITING_REQUESTS)
    loader = make_media_loader(engine_args, args, limits)
    async with AsyncExitStack() as at_end:
        at_end.push_async_callback(asyncio.to_thread, loader.close)
        on_end: list[OnEnd] = []
        if args.otlp_traces_endpoint is not None:
            traces = _traces(args.otlp_traces_endpoint)
            at_end.push_async_callback(asyncio.to_thread, traces.close)
            on_end.append(traces.take)
        engine = await AsyncLLMEngine.start(
            engine_args,
            media_loader=loader,
            make_core=make_core,
            accept_embeddings=args.allow_embeddings,
            max_restarts=args.restart_core,
            log=args.log_settings,
        )
        at_end.push_async_callback(engine.shutdown, args.drain_s)
        pool = ThreadPoolExecutor(_NUM_OTHER_THREADS, thread_name_prefix="sensorium-front")
        asyncio.get_running_loop().set_default_executor(pool)
        yield _app(engine, engine_args, args, loader, on_end), engine


def _traces(endpoint: str) -> Traces:
    require("tracing", f"otlp_traces_endpoint: got {endpoint!r}, which")
    from sensorium.entrypoints.openai.tracing import Traces  # loads OpenTelemetry

    return Traces.to(endpoint)


def make_media_loader(engine_args: EngineArgs, args: ServerArgs, limits: MediaLimits | None) -> MediaLoader:
    """What fetches and decodes the media that requests name, within what the operator allows."""
    limits = limits or MediaLimits()
    budget = MediaBudget(args.max_waiting_media_bytes)
    return MediaLoader(limits, fetch_policy(engine_args, args), budget=budget, decoders=DecoderPool(limits))


def _app(
    engine: AsyncLLMEngine,
    engine_args: EngineArgs,
    args: ServerArgs,
    loader: MediaLoader,
    on_end: Sequence[OnEnd],
) -> Starlette:
    renderer = None
    if engine.tokenizer is not None:
        renderer = ChatRenderer(
            engine.config.model_config,
            engine.tokenizer,
            loader,
            chat_template=engine_args.chat_template or plain_template(engine.config.model_config, engine.tokenizer),
            trust_request_chat_template=args.trust_request_chat_template,
            accept_objects=False,
            accept_embeddings=args.allow_embeddings,
            named_media=NamedMedia(args.max_named_media_bytes),
            media_are_apart=not args.share_caches,
            tool_parser=engine_args.tool_parser,
            reasoning_parser=engine_args.reasoning_parser,
        )
    context = ServerContext(
        engine,
        renderer,
        args.served_model_name or (engine_args.model,),
        ServerMetrics(engine),
        loader,
        adapter_names=tuple(engine_args.lora_modules),
        allow_mm_processor_kwargs=args.allow_mm_processor_kwargs,
        share_caches=args.share_caches,
        min_priority=args.min_priority,
        strict_reasoning_effort=args.strict_reasoning_effort,
        score_template=engine_args.chat_template,
    )
    return create_app(
        context,
        transcriptions=TranscriptionRoutes(
            context, instruction=args.transcription_instruction, answer=args.transcription_answer
        ),
        responses=ResponseStore(args.max_stored_responses, args.max_stored_response_bytes),
        api_keys=args.api_key,
        allowed_origins=args.allowed_origin,
        allowed_hosts=args.host_names,
        max_body_bytes=args.max_body_bytes,
        max_waiting_bytes=args.max_waiting_bytes,
        max_requests=args.max_connections,
        playground=args.playground,
        on_end=on_end,
    )


async def serve(engine_args: EngineArgs, args: ServerArgs, limits: MediaLimits, sockets: list[socket.socket]) -> int:
    """Serve on sockets that listen, until told to stop, or until the engine dies. Returns the exit status of the
    process.
    """
    if not args.api_key and not args.is_local:
        logger.warning("No API key is set, and the server listens on %s: whoever reaches it may use it.", args.host)
    args = replace(args, max_connections=num_connections_for(args.max_connections))
    async with running_app(engine_args, args, limits) as (app, engine):
        server = HttpServer(uvicorn_config(app, args), args.max_connections, args.deadlines, url=url_of(args, sockets))
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, server.stop)
        watcher = asyncio.create_task(_watch(engine, server))
        gc.collect()
        gc.freeze()  # what is loaded stays: to look through it for garbage takes a third of a second, in a stream
        try:
            await server.serve(sockets)
        finally:
            watcher.cancel()
        return 1 if engine.has_ended else 0


def uvicorn_config(app: Starlette, args: ServerArgs) -> uvicorn.Config:
    """How uvicorn is to run `app`."""
    return uvicorn.Config(
        app,
        host=args.host,
        port=args.port,
        ws="none",
        lifespan="off",
        timeout_keep_alive=args.keep_alive_s,
        timeout_graceful_shutdown=max(1, round(args.drain_s)),
        ssl_certfile=args.ssl_certfile,
        ssl_keyfile=args.ssl_keyfile,
        access_log=False,
        server_header=False,
        log_config=None,  # its lines go the way of ours
        log_level=args.log_level.lower(),
    )


def num_connections_for(wanted: int) -> int:
    """Let the process open as many files as its connections need, as far as the system allows; as many connections as
    it then can have.

    Raises:
        ConfigError: It can't have any.
    """
    others = len(os.listdir("/dev/fd")) + _OTHER_FILES + NUM_RESERVED + ACCEPTED_AT_ONCE
    needed = others + _FILES_PER_CONNECTION * wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed == needed:
        return wanted
    fitting = (allowed - others) // _FILES_PER_CONNECTION
    if fitting < 1:
        raise ConfigError(
            f"open files: got a limit of {allowed}, expected at least {others + _FILES_PER_CONNECTION}. "
            "Raise it with ulimit -n."
        )
    logger.warning(
        "max_connections: got %d, which take %d open files, and the system allows %d: %d connections are served at "
        "once. Raise the limit with ulimit -n, or lower max_connections.",
        *(wanted, needed, allowed, fitting),
    )
    return fitting


async def _watch(engine: AsyncLLMEngine, server: uvicorn.Server) -> None:
    """Stop the server once the engine is dead for good; whoever runs the process starts both anew."""
    while not engine.has_ended:
        await asyncio.sleep(_WATCH_INTERVAL_S)
    server.should_exit = True
