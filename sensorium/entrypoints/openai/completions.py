"""`/v1/completions`: prompts without a chat around them."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeAlias

from starlette.requests import Request
from starlette.responses import Response

from sensorium.engine.detokenizer import Detokenizer
from sensorium.entrypoints.openai.answers import Usage, completion_logprobs, prompt_logprobs
from sensorium.entrypoints.openai.context import ServerContext
from sensorium.entrypoints.openai.echo import NO_ECHO, Echo, make_echo
from sensorium.entrypoints.openai.http import EventStream, JsonResponse, merged, read_body, while_connected, with_first
from sensorium.entrypoints.openai.protocol import CompletionBody, StreamOptions
from sensorium.outputs import CompletionOutput, OutputKind, RequestOutput
from sensorium.sampling_params import SamplingParams

Numbered: TypeAlias = AsyncIterator[tuple[int, RequestOutput]]
Echoed: TypeAlias = AsyncIterator[tuple[int, RequestOutput, Echo]]
_Done: TypeAlias = tuple[RequestOutput, Echo]


class CompletionRoutes:
    """Answers prompts."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        tokenizer = context.engine.tokenizer
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)

    async def completions(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        body = await read_body(request, CompletionBody)
        answer = _Answer(request.state.request_id, self._context.check_model(body.model), body)
        params, prompts = body.params(self._context.sampling_defaults), body.prompts()
        self._context.check_kwargs(body.mm_processor_kwargs)
        options = body.options()
        if not body.stream:
            outputs = await while_connected(request, self._whole(request, body, prompts, params))
            return JsonResponse(answer.whole(outputs))
        stream = await while_connected(request, self._started(request, body, prompts, params))
        return EventStream(answer.chunks(stream, options), is_padded=options.include_obfuscation)

    def _generate(
        self, request: Request, body: CompletionBody, prompts: list[Any], params: SamplingParams, kind: OutputKind
    ) -> Numbered:
        self._context.check_accepts(request)
        kwargs = {"mm_processor_kwargs": body.mm_processor_kwargs} if body.mm_processor_kwargs else {}
        return merged(
            [
                self._context.generate(
                    request,
                    _prompt(prompt, body) | kwargs,
                    params,
                    kind,
                    model=body.model,
                    priority=body.priority,
                    cache_salt=body.cache_salt,
                    in_own_terms=body.in_own_terms,
                )
                for prompt in prompts
            ]
        )

    async def _with_echoes(self, body: CompletionBody, outputs: Numbered) -> Echoed:
        """The same outputs, the first of each prompt with the prompt's echo if there is to be one."""
        echoed: set[int] = set()
        waiting: dict[int, list[RequestOutput]] = {}
        async with aclosing(outputs):  # type: ignore[type-var]
            async for index, output in outputs:
                if index in echoed or not body.echo:
                    yield index, output, NO_ECHO
                    continue
                waiting.setdefault(index, []).append(output)
                if body.logprobs is None or output.prompt_logprobs is not None:
                    echoed.add(index)
                    echo = await self._echo(body, output)
                    for each in waiting.pop(index):
                        yield index, each, echo

    async def _echo(self, body: CompletionBody, output: RequestOutput) -> Echo:
        skips = body.skip_special_tokens is not False
        return await self._context.engine.in_pool(
            lambda: make_echo(output, self._detokenizer, body.logprobs, skip_special_tokens=skips)
        )

    async def _whole(
        self, request: Request, body: CompletionBody, prompts: list[Any], params: SamplingParams
    ) -> list[_Done]:
        found: dict[int, _Done] = {}
        generated = self._generate(request, body, prompts, params, OutputKind.FINAL_ONLY)
        async with aclosing(self._with_echoes(body, generated)) as outputs:  # type: ignore[type-var]
            async for index, output, echo in outputs:
                found[index] = output, echo
        return [found[index] for index in range(len(prompts))]

    async def _started(
        self, request: Request, body: CompletionBody, prompts: list[Any], params: SamplingParams
    ) -> Echoed:
        generated = self._generate(request, body, prompts, params, OutputKind.DELTA)
        return await with_first(self._with_echoes(body, generated))


def _prompt(prompt: Any, body: CompletionBody) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"prompt": prompt, "add_special_tokens": body.add_special_tokens}
    return {"prompt_token_ids": prompt}


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
        self._is_empty = body.is_empty
        self._reports_prompt = body.prompt_logprobs is not None
        self._usage = Usage()

    def whole(self, done: list[_Done]) -> dict[str, Any]:
        """The answer in one piece."""
        choices = []
        for index, (output, echo) in enumerate(done):
            for each in self._taken(index, output):
                choice = self._choice(index, each, len(echo.text), echo)
                if self._reports_prompt:
                    choice["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
                choices.append(choice)
        return {**self._head, "choices": choices, "usage": self._usage.body()}

    async def chunks(self, outputs: Echoed, options: StreamOptions) -> AsyncIterator[Any]:
        """The answer in pieces of the same form, with usage where it is wanted."""
        echoes: dict[int, Echo] = {}
        begun: set[int] = set()
        async with aclosing(outputs):  # type: ignore[type-var]
            async for index, output, given in outputs:
                whole_echo = echoes.setdefault(index, given)
                for each in self._taken(index, output):
                    number = index * self._n + each.index
                    echo = NO_ECHO if number in begun else whole_echo
                    begun.add(number)
                    choice = self._choice(index, each, len(whole_echo.text), echo)
                    usage = {"usage": self._usage.body()} if options.continuous_usage_stats else {}
                    yield {**self._head, "choices": [choice], **usage}
        if options.include_usage:
            yield {**self._head, "choices": [], "usage": self._usage.body()}

    def _taken(self, index: int, output: RequestOutput) -> list[CompletionOutput]:
        """A prompt's outputs, counted. If no answer is wanted, the token that was generated is removed."""
        if self._is_empty:
            output = replace(output, outputs=[_emptied(each) for each in output.outputs])
        self._usage.take(index, output)
        return output.outputs

    def _choice(self, prompt: int, output: CompletionOutput, offset: int, echo: Echo) -> dict[str, Any]:
        text, logprobs = echo.before(output.text, completion_logprobs(output, self._num_top, offset))
        return {
            "index": prompt * self._n + output.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": output.finish_reason,
        }


def _emptied(output: CompletionOutput) -> CompletionOutput:
    return replace(
        output,
        text="",
        token_ids=[],
        logprobs=None if output.logprobs is None else [],
        text_offsets=None,
        finish_reason="length",
        stop_reason=None,
    )
