"""`/v1/chat/completions`, and what a chat would cost."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from sensorium.entrypoints.openai.answers import Usage, chat_logprobs
from sensorium.entrypoints.openai.context import ServerContext
from sensorium.entrypoints.openai.http import EventStream, JsonResponse, read_json, while_connected, with_first
from sensorium.entrypoints.openai.protocol import ChatBody, TokenCostBody, parse_body
from sensorium.outputs import CompletionOutput, OutputKind, RequestOutput
from sensorium.sampling_params import SamplingParams


class ChatRoutes:
    """Answers chats."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def completions(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        body = parse_body(ChatBody, await read_json(request))
        answer = _ChatAnswer(request.state.request_id, self._context.check_model(body.model), body)
        params = body.params()
        wants_usage = body.include_usage()
        if not body.stream:
            output = await while_connected(request, self._whole(request, body, params))
            return JsonResponse(answer.whole(output))
        outputs = await while_connected(request, self._started(request, body, params))
        return EventStream(answer.chunks(outputs, include_usage=wants_usage))

    async def token_cost(self, request: Request) -> Response:
        """`POST /v1/chat/token_cost`: prompt tokens of a chat, media counted one by one, without generating."""
        body = parse_body(TokenCostBody, await read_json(request))
        self._context.check_model(body.model)
        return JsonResponse(await while_connected(request, self._cost(request, body)))

    async def _cost(self, request: Request, body: TokenCostBody) -> dict[str, Any]:
        prompt = await self._context.render(request, body.messages, **body.render_options())
        processed = await self._context.engine.preprocess(prompt, SamplingParams(max_tokens=None))
        return {
            "prompt_tokens": processed.num_prompt_tokens,
            "media_tokens": {name: list(counts) for name, counts in processed.media_token_counts.items()},
            "max_model_len": self._context.engine.config.model_config.max_model_len,
        }

    async def _generate(
        self, request: Request, body: ChatBody, params: SamplingParams, kind: OutputKind
    ) -> AsyncIterator[RequestOutput]:
        prompt = await self._context.render(request, body.messages, **body.render_options())
        outputs = self._context.generate(prompt, params, kind, priority=body.priority, cache_salt=body.cache_salt)
        del prompt  # the media that it holds
        async with aclosing(outputs):  # type: ignore[type-var]
            async for output in outputs:
                yield output

    async def _whole(self, request: Request, body: ChatBody, params: SamplingParams) -> RequestOutput:
        generated = self._generate(request, body, params, OutputKind.FINAL_ONLY)
        async with aclosing(generated) as outputs:  # type: ignore[type-var]
            return await anext(outputs)

    async def _started(self, request: Request, body: ChatBody, params: SamplingParams) -> AsyncIterator[RequestOutput]:
        return await with_first(self._generate(request, body, params, OutputKind.DELTA))


class _ChatAnswer:
    """One answer in OpenAI's form."""

    def __init__(self, request_id: str, model: str, body: ChatBody) -> None:
        self._head = {"id": f"chatcmpl-{request_id}", "created": int(time.time()), "model": model}
        self._num_top = body.top_logprobs or 0

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        """A `chat.completion`."""
        usage = Usage()
        usage.take(0, output)
        choices = [
            {
                "index": each.index,
                "message": {"role": "assistant", "content": each.text, "refusal": None},
                "logprobs": chat_logprobs(each, self._num_top),
                "finish_reason": each.finish_reason,
            }
            for each in output.outputs
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage.body()}

    async def chunks(self, outputs: AsyncIterator[RequestOutput], *, include_usage: bool) -> AsyncIterator[Any]:
        """`chat.completion.chunk`s: a role first for each choice, then deltas, at the end the usage if wanted."""
        usage = Usage()
        begun: set[int] = set()
        async with aclosing(outputs):  # type: ignore[type-var]
            async for output in outputs:
                usage.take(0, output)
                for each in output.outputs:
                    if each.index not in begun:
                        begun.add(each.index)
                        yield self._chunk([_choice(each.index, {"role": "assistant", "content": ""})])
                    yield self._chunk([self._delta(each)])
        if include_usage:
            yield {**self._chunk([]), "usage": usage.body()}

    def _delta(self, output: CompletionOutput) -> dict[str, Any]:
        delta = {"content": output.text} if output.text else {}
        logprobs = chat_logprobs(output, self._num_top)
        return {**_choice(output.index, delta), "logprobs": logprobs, "finish_reason": output.finish_reason}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": choices}


def _choice(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
