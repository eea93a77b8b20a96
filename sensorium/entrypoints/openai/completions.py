"""`/v1/completions` and `/v1/embeddings`: prompts without a chat around them."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from sensorium.entrypoints.openai.answers import Usage, completion_logprobs
from sensorium.entrypoints.openai.context import ServerContext
from sensorium.entrypoints.openai.http import EventStream, JsonResponse, merged, read_json, while_connected, with_first
from sensorium.entrypoints.openai.protocol import CompletionBody, EmbeddingBody, parse_body
from sensorium.outputs import CompletionOutput, OutputKind, PoolingRequestOutput, RequestOutput
from sensorium.sampling_params import SamplingParams

Numbered = AsyncIterator[tuple[int, RequestOutput]]


class CompletionRoutes:
    """Answers prompts."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def completions(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        body = parse_body(CompletionBody, await read_json(request))
        answer = _Answer(request.state.request_id, self._context.check_model(body.model), body)
        params, prompts = body.params(), body.prompts()
        self._context.check_kwargs(body.mm_processor_kwargs)
        wants_usage = body.include_usage()
        if not body.stream:
            outputs = await while_connected(request, self._whole(body, prompts, params))
            return JsonResponse(answer.whole(outputs))
        stream = await while_connected(request, self._started(body, prompts, params))
        return EventStream(answer.chunks(stream, include_usage=wants_usage))

    async def embeddings(self, request: Request) -> Response:
        """`POST /v1/embeddings`."""
        body = parse_body(EmbeddingBody, await read_json(request))
        name, prompts = self._context.check_model(body.model), body.prompts()
        outputs = await while_connected(request, self._pool(prompts))
        num_tokens = sum(len(output.prompt_token_ids) for output in outputs)
        data = [
            {"object": "embedding", "index": index, "embedding": _vector(output, body.encoding_format)}
            for index, output in enumerate(outputs)
        ]
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        return JsonResponse({"object": "list", "data": data, "model": name, "usage": usage})

    async def _pool(self, prompts: list[Any]) -> list[PoolingRequestOutput]:
        self._context.engine.check_accepts()
        tasks = [asyncio.ensure_future(self._context.engine.encode(prompt)) for prompt in prompts]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _generate(self, body: CompletionBody, prompts: list[Any], params: SamplingParams, kind: OutputKind) -> Numbered:
        self._context.engine.check_accepts()
        kwargs = {"mm_processor_kwargs": body.mm_processor_kwargs} if body.mm_processor_kwargs else {}
        return merged(
            [
                self._context.generate(
                    {"prompt" if isinstance(prompt, str) else "prompt_token_ids": prompt, **kwargs},
                    params,
                    kind,
                    priority=body.priority,
                    cache_salt=body.cache_salt,
                )
                for prompt in prompts
            ]
        )

    async def _whole(self, body: CompletionBody, prompts: list[Any], params: SamplingParams) -> list[RequestOutput]:
        found: dict[int, RequestOutput] = {}
        async with aclosing(self._generate(body, prompts, params, OutputKind.FINAL_ONLY)) as outputs:  # type: ignore[type-var]
            async for index, output in outputs:
                found[index] = output
        return [found[index] for index in range(len(prompts))]

    async def _started(self, body: CompletionBody, prompts: list[Any], params: SamplingParams) -> Numbered:
        return await with_first(self._generate(body, prompts, params, OutputKind.DELTA))


def _vector(output: PoolingRequestOutput, encoding: str) -> str | list[float]:
    assert output.outputs is not None
    vector = output.outputs.embedding
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    values: list[float] = vector.tolist()
    return values


class _Answer:
    """One answer in OpenAI's form. Choice `i * n + j` is output `j` of prompt `i`."""

    def __init__(self, request_id: str, model: str, body: CompletionBody) -> None:
        self._head = {
            "id": f"cmpl-{request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._num_top = body.logprobs or 0
        self._n = body.n or 1

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """The answer in one piece."""
        usage = Usage()
        choices = []
        for index, output in enumerate(outputs):
            usage.take(index, output)
            choices += [self._choice(index, each, 0) for each in output.outputs]
        return {**self._head, "choices": choices, "usage": usage.body()}

    async def chunks(self, outputs: Numbered, *, include_usage: bool) -> AsyncIterator[Any]:
        """The answer in pieces of the same form, at the end the usage if wanted."""
        usage = Usage()
        offsets: dict[tuple[int, int], int] = {}
        async with aclosing(outputs):  # type: ignore[type-var]
            async for index, output in outputs:
                usage.take(index, output)
                for each in output.outputs:
                    offset = offsets.get((index, each.index), 0)
                    offsets[index, each.index] = offset + len(each.text)
                    yield {**self._head, "choices": [self._choice(index, each, offset)]}
        if include_usage:
            yield {**self._head, "choices": [], "usage": usage.body()}

    def _choice(self, prompt: int, output: CompletionOutput, offset: int) -> dict[str, Any]:
        return {
            "index": prompt * self._n + output.index,
            "text": output.text,
            "logprobs": completion_logprobs(output, self._num_top, offset),
            "finish_reason": output.finish_reason,
        }
