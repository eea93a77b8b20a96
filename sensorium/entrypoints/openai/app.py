"""The application: routes, the one error path, and the middleware in front of both."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import sensorium
from sensorium.entrypoints.openai.chat import ChatRoutes
from sensorium.entrypoints.openai.completions import CompletionRoutes
from sensorium.entrypoints.openai.context import ServerContext
from sensorium.entrypoints.openai.errors import HttpError, error_response, forget_frames
from sensorium.entrypoints.openai.http import JsonResponse, read_body, while_connected
from sensorium.entrypoints.openai.middleware import ApiKeys, BodyBounds, Capacity, OnEnd, RequestRecords, log_record
from sensorium.entrypoints.openai.playground import playground_routes
from sensorium.entrypoints.openai.pooling.routes import PoolingRoutes
from sensorium.entrypoints.openai.protocol import DetokenizeBody, TokenizeBody
from sensorium.entrypoints.openai.responses.routes import ResponseRoutes
from sensorium.entrypoints.openai.responses.store import ResponseStore
from sensorium.entrypoints.openai.transcriptions import TranscriptionRoutes
from sensorium.entrypoints.openai.web_pages import WebPages
from sensorium.errors import InvalidRequestError, SensoriumError
from sensorium.inputs.tokenizer import TextEncoder
from sensorium.multimodal import MULTIMODAL_REGISTRY


def create_app(
    context: ServerContext,
    *,
    transcriptions: TranscriptionRoutes | None = None,
    responses: ResponseStore | None = None,
    api_keys: Sequence[str] = (),
    allowed_origins: Sequence[str] = (),
    allowed_hosts: Sequence[str] | None = None,
    max_body_bytes: int = 128 << 20,
    max_waiting_bytes: int = 1 << 30,
    max_requests: int = 4096,
    playground: bool = True,
    on_end: Sequence[OnEnd] = (),
) -> Starlette:
    """An ASGI application over a running engine, which the caller shuts down.

    Args:
        context: the engine and what goes with it.
        transcriptions: how the model is asked to transcribe, if not in its own way. responses: the store of responses;
        none are kept by default. api_keys: every request but those for health must have one of these; without any, none
        is needed. allowed_origins: origins of pages that browsers may let use this server; "*" for all. Without API
        keys, those
            of others are refused.
        allowed_hosts: names that a `Host` header may have, beside addresses and those of the loopback; None for any.
        max_body_bytes: bound on one body.
        max_waiting_bytes: bound on all bodies whose answers have not begun.
        max_requests: requests at once, those for health excepted.
        playground: serve a page to try the model at `/`.
        on_end: called with the record of each request that has ended.
    """
    chat, completions, plain = ChatRoutes(context), CompletionRoutes(context), PlainRoutes(context)
    transcriptions = transcriptions or TranscriptionRoutes(context)
    routes = [
        Route("/v1/chat/completions", chat.completions, methods=["POST"]),
        Route("/v1/chat/token_cost", chat.token_cost, methods=["POST"]),
        Route("/v1/completions", completions.completions, methods=["POST"]),
        *PoolingRoutes(context).routes(),
        Route("/v1/audio/transcriptions", transcriptions.transcriptions, methods=["POST"]),
        Route("/v1/audio/translations", transcriptions.translations, methods=["POST"]),
        *ResponseRoutes(context, ResponseStore(0, 0) if responses is None else responses).routes(),
        Route("/v1/models", plain.models),
        Route("/v1/models/{name:path}", plain.model),
        Route("/tokenize", plain.tokenize, methods=["POST"]),
        Route("/detokenize", plain.detokenize, methods=["POST"]),
        Route("/health", plain.health),
        Route("/ping", plain.ping, methods=["GET", "POST"]),
        Route("/version", plain.version),
        Route("/metrics", plain.metrics),
    ]
    pages = playground_routes() if playground else []
    paths = {route.endpoint: route.path for route in [*routes, *pages]}
    middleware = [Middleware(RequestRecords, on_end=(context.metrics.take, log_record, *on_end), routes=paths)]
    middleware.append(Middleware(Capacity, max_requests=max_requests))
    if not api_keys or allowed_hosts is not None:
        # With API keys, the key protects against foreign pages: a page that has one was given it.
        origins = ("*",) if api_keys else allowed_origins
        middleware.append(Middleware(WebPages, allowed_origins=origins, allowed_hosts=allowed_hosts))
    if allowed_origins:
        # Before the check of keys: a browser's preflight request has none.
        middleware.append(
            Middleware(CORSMiddleware, allow_origins=allowed_origins, allow_methods=["*"], allow_headers=["*"])
        )
    if api_keys:
        middleware.append(Middleware(ApiKeys, keys=api_keys, page_paths=[page.path for page in pages]))
    middleware.append(Middleware(BodyBounds, max_body_bytes=max_body_bytes, max_waiting_bytes=max_waiting_bytes))
    handlers = {HTTPException: _http_exception, Exception: _failure, SensoriumError: _failure}
    return Starlette(routes=[*routes, *pages], middleware=middleware, exception_handlers=handlers)  # type: ignore[arg-type]


class PlainRoutes:
    """Routes about the server itself, which the model doesn't answer."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        tokenizer = context.engine.tokenizer
        self._encoder = None if tokenizer is None else TextEncoder(tokenizer)
        self._token_check: asyncio.Task[None] | None = None

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`."""
        return JsonResponse({"object": "list", "data": [self._model(name) for name in self._context.all_names]})

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/<name>`."""
        return JsonResponse(self._model(self._context.check_model(request.path_params["name"])))

    async def tokenize(self, request: Request) -> Response:
        """`POST /tokenize`."""
        body = await read_body(request, TokenizeBody)
        self._context.check_model(body.model)
        self._context.tokenizer()
        assert self._encoder is not None
        most = self._context.engine.config.model_config.max_model_len
        encoder, text, adds = self._encoder, body.prompt, body.add_special_tokens
        tokens = await self._context.engine.in_pool(lambda: encoder.encode_bounded(text, most, add_special_tokens=adds))
        return JsonResponse({"tokens": tokens, "count": len(tokens), "max_model_len": most})

    async def detokenize(self, request: Request) -> Response:
        """`POST /detokenize`."""
        body = await read_body(request, DetokenizeBody)
        self._context.check_model(body.model)
        tokenizer, tokens = self._context.tokenizer(), body.tokens
        config = self._context.engine.config.model_config
        if len(tokens) > config.max_model_len or not all(0 <= each < config.vocab_size for each in tokens):
            raise InvalidRequestError(
                f"got {len(tokens)} ids or one outside the vocabulary, expected at most {config.max_model_len} "
                f"ids of 0 to {config.vocab_size - 1}. Change tokens.",
                field="tokens",
            )
        text = await self._context.engine.in_pool(lambda: tokenizer.decode(tokens))
        return JsonResponse({"prompt": text})

    async def health(self, request: Request) -> Response:
        """`GET /health`: 200 while the engine runs; with `?generate=1`, once the model has made a real token."""
        wanted = request.query_params.get("generate", "0") in ("1", "true")
        await while_connected(request, self._check_token() if wanted else self._context.engine.check_health())
        return JsonResponse({"status": "ok"})

    async def _check_token(self) -> None:
        """Concurrent requests share one check: the route needs no key, and must not cause work for each request."""
        if self._token_check is None or self._token_check.done():
            self._token_check = asyncio.create_task(self._context.engine.check_health(generate=True))
        await asyncio.shield(self._token_check)

    async def ping(self, request: Request) -> Response:
        """`GET /ping`: 200 while the engine runs."""
        await self._context.engine.check_health()
        return Response()

    async def version(self, request: Request) -> Response:
        """`GET /version`."""
        return JsonResponse({"version": sensorium.__version__})

    async def metrics(self, request: Request) -> Response:
        """`GET /metrics`."""
        return Response(self._context.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _model(self, name: str) -> dict[str, object]:
        return {
            "id": name,
            "object": "model",
            "created": self._context.created_s,
            "owned_by": "sensorium",
            "max_model_len": self._context.engine.config.model_config.max_model_len,
            "limit_mm_per_prompt": self._media_limits(),
            "parent": None if self._context.adapter_of(name) is None else self._context.model_names[0],
        }

    def _media_limits(self) -> dict[str, int]:
        """The most items of one request, for each modality that the model takes."""
        config = self._context.engine.config.model_config
        limits = MULTIMODAL_REGISTRY.get_mm_limits_per_prompt(config)
        taken = (name for name in limits if MULTIMODAL_REGISTRY.get_plugin(name).has_input_mapper(config.model_class))
        return {name: limits[name] for name in taken if limits[name]}


async def _failure(_request: Request, error: Exception) -> Response:
    response = error_response(error)
    forget_frames(error)
    return response


async def _http_exception(request: Request, error: HTTPException) -> Response:
    """The answer to a path or method that doesn't exist."""
    if error.status_code == 405:
        message = f"method: got {request.method:.16}, expected {(error.headers or {}).get('Allow', 'another')}."
        return error_response(HttpError(405, message, headers=error.headers))
    if error.status_code == 404:
        return error_response(HttpError(404, "path: got one that this server doesn't have. See docs/serving.md."))
    return error_response(HttpError(error.status_code, "the request could not be read."))
