"""State that all routes of a server share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from sensorium.chat.renderer import ChatRenderer
from sensorium.chat.template import EFFORTS
from sensorium.engine.async_llm_engine import AsyncLLMEngine
from sensorium.entrypoints.openai.errors import HttpError
from sensorium.entrypoints.openai.http import tenant_of
from sensorium.entrypoints.openai.metrics import ServerMetrics
from sensorium.entrypoints.openai.records import note_warning
from sensorium.errors import InvalidRequestError, RequestError, UnsupportedFeatureError
from sensorium.inputs.preprocess import ProcessedRequest
from sensorium.media import MediaLoader
from sensorium.outputs import OutputKind, PoolingRequestOutput, RequestOutput
from sensorium.pooling_params import PoolingParams
from sensorium.sampling_defaults import SamplingDefaults
from sensorium.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, eq=False)
class ServerContext:
    """One engine, under one or several names."""

    engine: AsyncLLMEngine
    renderer: ChatRenderer | None
    """None without a tokenizer."""
    model_names: tuple[str, ...]
    """Answers have the first."""
    metrics: ServerMetrics
    media_loader: MediaLoader
    adapter_names: tuple[str, ...] = ()
    """Adapters, which requests name as they name a model."""
    allow_mm_processor_kwargs: bool = False
    strict_reasoning_effort: bool = False
    share_caches: bool = False
    """Whether requests of all API keys share caches."""
    score_template: str | None = None
    """Makes a reranker's prompt of a query and a document; see `Scoring`."""
    min_priority: int = 0
    """The most urgent priority that requests may claim."""
    created_s: int = field(default_factory=lambda: int(time.time()))

    @property
    def all_names(self) -> tuple[str, ...]:
        """What requests may give as their model."""
        return self.model_names + self.adapter_names

    @property
    def sampling_defaults(self) -> SamplingDefaults:
        """Sampling values of requests that leave them out."""
        return self.engine.config.model_config.sampling_defaults

    def check_model(self, name: str | None) -> str:
        """The model name for the answer; no name means the only model. Raises `HttpError`."""
        if name is not None and name not in self.all_names:
            raise HttpError(
                404,
                f"got {name!r:.120}, expected one of {list(self.all_names)}. See /v1/models.",
                code="model_not_found",
                field="model",
            )
        return name or self.model_names[0]

    def adapter_of(self, name: str | None) -> str | None:
        """The adapter that a checked model name stands for; None for the model itself."""
        return name if name in self.adapter_names else None

    def check_kwargs(self, kwargs: dict[str, Any] | None) -> None:
        """Raises `UnsupportedFeatureError` where requests may not choose how media are processed."""
        if kwargs and not self.allow_mm_processor_kwargs:
            raise UnsupportedFeatureError(
                "got values with the request, expected none. The operator can allow them with "
                "--allow-mm-processor-kwargs.",
                field="mm_processor_kwargs",
            )

    def chat(self) -> ChatRenderer:
        """The renderer of chats. Raises `UnsupportedFeatureError` without a tokenizer."""
        if self.renderer is None:
            raise UnsupportedFeatureError(
                "got a chat, expected token ids, since the server runs without a tokenizer.", field="messages"
            )
        return self.renderer

    async def render(
        self,
        request: Request,
        messages: list[Any],
        *,
        mm_processor_kwargs: dict[str, Any] | None = None,
        reasoning_effort: str | None = None,
        effort_field: str = "reasoning_effort",
        **options: Any,
    ) -> dict[str, Any]:
        """The prompt of a chat, for `generate`; `options` as `ChatRenderer.render` has them. Raises `RequestError`.

        `effort_field`: the field by which the request sets the effort of reasoning.
        """
        self.check_kwargs(mm_processor_kwargs)
        self.check_accepts(request)  # before anything is fetched
        return await self.chat().arender(
            messages,
            scope=tenant_of(request),
            mm_processor_kwargs=mm_processor_kwargs,
            reasoning_effort=self._effort(reasoning_effort, effort_field, options),
            **options,
        )

    def _effort(self, effort: str | None, field_name: str, options: Mapping[str, Any]) -> str | None:
        """The effort passed to the template. If the template has no setting for it, it is ignored with a warning,
        because clients send it to every model.
        """
        if effort not in EFFORTS or self.strict_reasoning_effort:
            return effort
        template, has_tools = options.get("chat_template"), bool(options.get("tools"))
        if self.chat().hears_effort(chat_template=template, has_tools=has_tools):
            return effort
        note_warning(f"{field_name} was ignored: the model's chat template has no setting for it.")
        return None

    def tokenizer(self) -> Any:
        """The tokenizer. Raises `UnsupportedFeatureError` if there is none."""
        if self.engine.tokenizer is None:
            raise UnsupportedFeatureError(
                "got text, expected token ids, since there is no tokenizer here.", field="text"
            )
        return self.engine.tokenizer

    def check_accepts(self, request: Request) -> None:
        """`AsyncLLMEngine.check_accepts`, for the tenant that sent a request."""
        self.engine.check_accepts(tenant_of(request).hex())

    def salt(self, request: Request, given: str | None = None) -> str | None:
        """The salt that separates a request's caches: its API key, unless all share them, and its own salt."""
        tenant = tenant_of(request)
        if not tenant or self.share_caches:
            return given
        return tenant.hex() if given is None else f"{tenant.hex()}/{given}"

    async def encode(
        self,
        request: Request,
        prompt: Any,
        pooling: PoolingParams,
        *,
        model: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> PoolingRequestOutput:
        """`AsyncLLMEngine.encode` by a checked model name, for the tenant that sent a request, counted."""
        self._check_priority(priority)
        watch = self.metrics.watch()
        try:
            output = await self.engine.encode(
                prompt,
                pooling,
                priority=priority,
                cache_salt=self.salt(request, cache_salt),
                tenant=tenant_of(request).hex(),
                lora_request=self.adapter_of(model),
            )
            watch.pooled(output)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            watch.failed(error)
            raise
        finally:
            watch.close()
        return output

    async def preprocess(self, request: Request, prompt: Any) -> ProcessedRequest:
        """`AsyncLLMEngine.preprocess` of a prompt whose answer has no bound, for the tenant that sent a request."""
        params = SamplingParams(max_tokens=None)
        return await self.engine.preprocess(prompt, params, cache_salt=self.salt(request))

    async def generate(
        self,
        request: Request,
        prompt: Any,
        params: SamplingParams,
        kind: OutputKind,
        *,
        model: str | None,
        priority: int = 0,
        cache_salt: str | None = None,
        in_own_terms: Callable[[RequestError], RequestError] = lambda error: error,
    ) -> AsyncIterator[RequestOutput]:
        """`AsyncLLMEngine.generate` by a checked model name, for the tenant that sent a request, counted.

        `in_own_terms`: makes of an error what the client is told, in the terms of what it sent.
        """
        self._check_priority(priority)
        watch = self.metrics.watch()
        outputs = self.engine.generate(
            prompt,
            params,
            kind=kind,
            priority=priority,
            cache_salt=self.salt(request, cache_salt),
            tenant=tenant_of(request).hex(),
            lora_request=self.adapter_of(model),
        )
        del prompt  # the media that it holds
        try:
            async for output in outputs:
                watch.take(output)
                yield output
        except asyncio.CancelledError:
            raise
        except RequestError as error:
            watch.failed(error)
            raise in_own_terms(error) from None
        except Exception as error:
            watch.failed(error)
            raise
        finally:
            await outputs.aclose()  # type: ignore[attr-defined]
            watch.close()

    def _check_priority(self, priority: int) -> None:
        if priority and self.engine.config.scheduler_config.policy != "priority":
            raise InvalidRequestError(
                "got a priority, expected none under this server's policy. The operator can set "
                "--scheduling-policy priority.",
                field="priority",
            )
        if priority < self.min_priority:
            raise InvalidRequestError(
                f"got {priority}, expected at least {self.min_priority}: lower is more urgent. The operator "
                "can let requests claim more with --min-priority.",
                field="priority",
            )
