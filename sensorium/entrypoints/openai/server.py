"""From settings to a server that listens: engine, application, uvicorn; and an orderly end of all three."""

from __future__ import annotations

import asyncio
import resource
import signal
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import uvicorn
from starlette.applications import Starlette

from sensorium.engine.args import EngineArgs
from sensorium.engine.async_llm_engine import AsyncLLMEngine
from sensorium.engine.core_process import CoreFactory
from sensorium.entrypoints.extras import require
from sensorium.entrypoints.openai.app import create_app
from sensorium.entrypoints.openai.context import ServerContext
from sensorium.entrypoints.openai.listening import BACKLOG, url_of
from sensorium.entrypoints.openai.metrics import ServerMetrics
from sensorium.entrypoints.openai.middleware import OnEnd
from sensorium.entrypoints.openai.preflight import fetch_policy
from sensorium.entrypoints.openai.responses.store import ResponseStore
from sensorium.entrypoints.openai.server_args import ServerArgs
from sensorium.entrypoints.openai.transcriptions import TranscriptionRoutes
from sensorium.inputs.chat import ChatRenderer
from sensorium.inputs.named_media import NamedMedia
from sensorium.logger import get_logger
from sensorium.multimodal.media import DecoderPool, MediaBudget, MediaLimits, MediaLoader

if TYPE_CHECKING:
    from sensorium.entrypoints.openai.tracing import Traces

logger = get_logger(__name__)

DEFAULT_MAX_WAITING_REQUESTS = 1024
_MAX_HEADER_BYTES = 64 << 10
_KEEP_ALIVE_S = 30
_FILES_PER_CONNECTION = 2
"""A socket, and a segment of media on its way to the core."""
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
            chat_template=engine_args.chat_template,
            trust_request_chat_template=args.trust_request_chat_template,
            accept_objects=False,
            accept_embeddings=args.allow_embeddings,
            named_media=NamedMedia(args.max_named_media_bytes),
            tool_parser=engine_args.tool_parser,
            reasoning_parser=engine_args.reasoning_parser,
        )
    context = ServerContext(
        engine,
        renderer,
        args.served_model_name or (engine_args.model,),
        ServerMetrics(engine),
        loader,
        allow_mm_processor_kwargs=args.allow_mm_processor_kwargs,
        strict_reasoning_effort=args.strict_reasoning_effort,
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
        playground=args.playground,
        on_end=on_end,
    )


async def serve(engine_args: EngineArgs, args: ServerArgs, limits: MediaLimits, sockets: list[socket.socket]) -> int:
    """Serve on sockets that listen, until told to stop, or until the engine dies. Returns the exit status of the
    process.
    """
    if not args.api_key and not args.is_local:
        logger.warning("No API key is set, and the server listens on %s: whoever reaches it may use it.", args.host)
    _raise_file_limit(_FILES_PER_CONNECTION * args.max_connections)
    async with running_app(engine_args, args, limits) as (app, engine):
        server = _Server(uvicorn_config(app, args), url_of(args, sockets))
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, server.stop)
        watcher = asyncio.create_task(_watch(engine, server))
        try:
            await server.serve(sockets)
        finally:
            watcher.cancel()
        return 1 if engine.has_ended else 0


class _Server(uvicorn.Server):
    """Stops by `stop`. Uvicorn's own way is to let a signal end the process once its connections are closed, which
    would leave no time for the engine.
    """

    def __init__(self, config: uvicorn.Config, url: str) -> None:
        super().__init__(config)
        self._url = url

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer, and say so: uvicorn does where it makes its sockets itself."""
        await super().startup(sockets)
        logger.info("Sensorium running on %s (Ctrl-C stops it)", self._url)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield

    def stop(self) -> None:
        """Finish open requests; asked a second time, don't."""
        self.force_exit = self.should_exit
        self.should_exit = True


def uvicorn_config(app: Starlette, args: ServerArgs) -> uvicorn.Config:
    """How uvicorn is to run `app`."""
    return uvicorn.Config(
        app,
        host=args.host,
        port=args.port,
        backlog=BACKLOG,
        http="h11",  # the implementation that bounds headers
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        ws="none",
        lifespan="off",
        limit_concurrency=args.max_connections,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(args.drain_s)),
        ssl_certfile=args.ssl_certfile,
        ssl_keyfile=args.ssl_keyfile,
        access_log=False,
        server_header=False,
        log_config=None,  # its lines go the way of ours
        log_level=args.log_level.lower(),
    )


def _raise_file_limit(wanted: int) -> None:
    """Let the process open as many files as its connections need, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < wanted:
        logger.warning("open files: got a limit of %d, expected %d. Raise it, or lower max_connections.", most, wanted)


async def _watch(engine: AsyncLLMEngine, server: uvicorn.Server) -> None:
    """Stop the server once the engine is dead for good; whoever runs the process starts both anew."""
    while not engine.has_ended:
        await asyncio.sleep(_WATCH_INTERVAL_S)
    server.should_exit = True
