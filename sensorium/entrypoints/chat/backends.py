"""The backends of a chat: a model on this machine, or a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Protocol

import httpx
import msgspec

from sensorium.engine.args import EngineArgs
from sensorium.entrypoints.bench.events import EventReader
from sensorium.entrypoints.bench.http_client import ServerAddress
from sensorium.entrypoints.chat.conversation import Messages
from sensorium.errors import InvalidRequestError, SensoriumError
from sensorium.logger import LogSettings
from sensorium.media.limits import MediaLimits
from sensorium.sampling_params import SamplingParams

LIMITS_OF_A_CHAT = {"image": 8, "video": 2, "audio": 4}
"""Default bound on the items of one conversation: those of earlier turns count."""
_CONNECT_TIMEOUT_S = 15.0


class ServerError(SensoriumError):
    """A server refused, broke off, or can't be reached."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of an answer."""

    text: str
    is_reasoning: bool = False
    num_tokens: int = 1


class Backend(Protocol):
    """Answers conversations. Belongs to one event loop."""

    @property
    def model(self) -> str:
        """The model's name, for display."""

    def stream(self, messages: Messages) -> AsyncIterator[Piece]:
        """The answer as it comes; closing the iterator stops it. Raises `SensoriumError`."""

    async def close(self) -> None:
        """Free everything."""


class LocalBackend:
    """A model loaded here, with the engine's core in its own process. Made by `start`."""

    def __init__(self, model: str, engine: Any, renderer: Any, params: SamplingParams) -> None:
        """For `start`."""
        self.model = model
        self._engine = engine
        self._renderer = renderer
        self._params = params

    @classmethod
    async def start(cls, args: EngineArgs, limits: MediaLimits, sampling: Mapping[str, Any]) -> LocalBackend:
        """Load a model. `sampling` holds values of `SamplingParams`; others are the checkpoint's, or the engine's.

        Raises:
            ConfigError, ModelError, WeightsError: It can't be run as asked.
            InvalidRequestError: It has no tokenizer, or no chat template.
        """
        from sensorium.chat.renderer import ChatRenderer
        from sensorium.engine.async_llm_engine import AsyncLLMEngine
        from sensorium.media import FetchPolicy, MediaLoader

        if not args.limit_mm_per_prompt:
            args = replace(args, limit_mm_per_prompt=await asyncio.to_thread(_limits, args))
        loader = MediaLoader(limits, FetchPolicy())
        engine = await AsyncLLMEngine.start(args, media_loader=loader, log=LogSettings("WARNING"))
        if engine.tokenizer is None:
            await engine.shutdown()
            raise InvalidRequestError(
                "got true, expected false: a chat is text. Remove it.", field="skip_tokenizer_init"
            )
        renderer = ChatRenderer(
            engine.config.model_config, engine.tokenizer, loader, chat_template=args.chat_template, accept_objects=False
        )
        params = engine.config.model_config.sampling_defaults.params(sampling, max_tokens=None)
        return cls(args.model, engine, renderer, params)

    async def stream(self, messages: Messages) -> AsyncIterator[Piece]:
        """See `Backend`."""
        from sensorium.outputs import OutputKind

        prompt = await self._renderer.arender(messages)
        async with aclosing(self._engine.generate(prompt, self._params, kind=OutputKind.DELTA)) as outputs:
            async for output in outputs:
                for each in output.outputs:
                    yield Piece(each.text, num_tokens=len(each.token_ids))

    async def close(self) -> None:
        """See `Backend`."""
        await self._engine.shutdown()


def _limits(args: EngineArgs) -> dict[str, int]:
    """Limits for each modality that the model takes, so that a conversation may hold several items."""
    from sensorium.multimodal import MULTIMODAL_REGISTRY

    model_class = args.create_engine_config().model_config.model_class
    return {
        modality: count
        for modality, count in LIMITS_OF_A_CHAT.items()
        if MULTIMODAL_REGISTRY.get_plugin(modality).has_input_mapper(model_class)
    }


class RemoteBackend:
    """A server that speaks OpenAI's API. Made by `start`."""

    def __init__(self, model: str, client: httpx.AsyncClient, fields: Mapping[str, Any]) -> None:
        """For `start`."""
        self.model = model
        self._client = client
        self._fields = fields

    @classmethod
    async def start(cls, url: str, api_key: str | None, model: str | None, fields: Mapping[str, Any]) -> RemoteBackend:
        """Find the server, and its model if none is given. `fields` go with every request.

        Raises:
            ConfigError: The address is malformed.
            ServerError: No server answers there, or not as expected.
        """
        address = ServerAddress.parse(url)
        client = httpx.AsyncClient(
            base_url=f"{'https' if address.is_tls else 'http'}://{address.host_header}{address.prefix}",
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S),
            trust_env=address.host not in ("127.0.0.1", "::1", "localhost"),
        )
        backend = cls(model or "", client, fields)
        try:
            backend.model = model or await backend._first_model()
        except BaseException:
            await client.aclose()
            raise
        return backend

    async def stream(self, messages: Messages) -> AsyncIterator[Piece]:
        """See `Backend`."""
        body = msgspec.json.encode({"model": self.model, "messages": messages, "stream": True, **self._fields})
        headers = {"Content-Type": "application/json"}
        events = EventReader()
        try:
            async with self._client.stream("POST", "/v1/chat/completions", content=body, headers=headers) as response:
                if response.status_code != 200:
                    raise _refusal(response.status_code, await response.aread())
                async for data in response.aiter_bytes():
                    for event in events.feed(data):
                        if event != b"[DONE]":
                            yield _piece(event)
        except httpx.HTTPError as error:
            raise _unreachable(error) from error

    async def close(self) -> None:
        """See `Backend`."""
        await self._client.aclose()

    async def _first_model(self) -> str:
        try:
            response = await self._client.get("/v1/models")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _unreachable(error) from error
        if response.status_code != 200:
            raise _refusal(response.status_code, response.content)
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise ServerError("the server: got a list of models that can't be read. Name the model.") from None


def _unreachable(error: Exception) -> ServerError:
    return ServerError(f"the server: got no answer ({type(error).__name__}: {error}). Check --url.")


def _refusal(status: int, content: bytes) -> ServerError:
    try:
        text = msgspec.json.decode(content)["error"]["message"]
    except (msgspec.DecodeError, LookupError, TypeError):
        text = content[:200].decode("utf-8", "replace")
    return ServerError(f"status {status}: {text}")


def _piece(event: bytes) -> Piece:
    """A chunk's text. Raises `ServerError` for an error within the stream."""
    try:
        chunk = msgspec.json.decode(event)
        if chunk.get("error"):
            raise ServerError(str(chunk["error"].get("message", chunk["error"])))
        delta = chunk["choices"][0]["delta"] if chunk.get("choices") else {}
    except (msgspec.DecodeError, LookupError, TypeError, AttributeError):
        raise ServerError("the server: got a piece of an answer that can't be read.") from None
    reasoning = delta.get("reasoning_content") or delta.get("reasoning")
    if reasoning:
        return Piece(str(reasoning), is_reasoning=True)
    return Piece(str(delta.get("content") or ""), num_tokens=int("role" not in delta and bool(delta)))
