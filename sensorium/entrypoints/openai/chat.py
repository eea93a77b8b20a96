"""`/v1/chat/completions`, and what a chat would cost."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from sensorium.entrypoints.openai.chat_answer import ChatAnswer
from sensorium.entrypoints.openai.context import ServerContext
from sensorium.entrypoints.openai.http import EventStream, JsonResponse, only, read_body, while_connected, with_first
from sensorium.entrypoints.openai.protocol import ChatBody, TokenCostBody
from sensorium.entrypoints.openai.tools.plan import AnswerPlan
from sensorium.entrypoints.openai.tools.request import ToolRequest
from sensorium.outputs import OutputKind, RequestOutput
from sensorium.sampling_params import SamplingParams


@dataclass(slots=True, eq=False)
class _Turn:
    """A request in progress. The plan is made once the prompt is rendered."""

    http_request: Request
    body: ChatBody
    params: SamplingParams
    tools: ToolRequest | None
    plan: AnswerPlan = field(init=False)


class ChatRoutes:
    """Answers chats."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def completions(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        body = await read_body(request, ChatBody)
        turn = _Turn(request, body, body.params(self._context.sampling_defaults), body.tool_request())
        model, request_id = self._context.check_model(body.model), request.state.request_id
        options = body.options()
        if not body.stream:
            output = await while_connected(request, self._whole(turn))
            return JsonResponse(ChatAnswer(request_id, model, body, turn.plan).whole(output))
        outputs = await while_connected(request, self._started(turn))
        answer = ChatAnswer(request_id, model, body, turn.plan)
        return EventStream(answer.chunks(outputs, options), is_padded=options.include_obfuscation)

    async def token_cost(self, request: Request) -> Response:
        """`POST /v1/chat/token_cost`: prompt tokens of a chat, media counted one by one, without generating."""
        body = await read_body(request, TokenCostBody)
        self._context.check_model(body.model)
        return JsonResponse(await while_connected(request, self._cost(request, body)))

    async def _cost(self, request: Request, body: TokenCostBody) -> dict[str, Any]:
        prompt = await self._context.render(request, body.messages, **body.render_options(body.tool_request()))
        processed = await self._context.preprocess(request, prompt)
        return {
            "prompt_tokens": processed.num_prompt_tokens,
            "media_tokens": {name: list(counts) for name, counts in processed.media_token_counts.items()},
            "max_model_len": self._context.engine.config.model_config.max_model_len,
        }

    async def _generate(self, turn: _Turn, kind: OutputKind) -> AsyncIterator[RequestOutput]:
        """Render the prompt, plan the answer, and open the generator of its outputs."""
        body = turn.body
        prompt = await self._context.render(turn.http_request, body.messages, **body.render_options(turn.tools))
        turn.plan = self._plan(body, turn.tools, prompt["prompt"])
        return self._context.generate(
            turn.http_request,
            prompt,
            turn.plan.params(turn.params, body.constraint_field()),
            kind,
            model=body.model,
            priority=body.priority,
            cache_salt=body.cache_salt,
            in_own_terms=lambda error: body.in_own_terms(turn.plan.blame(error)),
        )

    def _plan(self, body: ChatBody, request: ToolRequest | None, prompt: str) -> AnswerPlan:
        formats = self._context.chat().answer_formats(chat_template=body.chat_template, has_tools=request is not None)
        tokenizer, is_continued = self._context.tokenizer(), body.continue_final_message
        return AnswerPlan(formats, request, prompt, tokenizer, is_continued=is_continued)

    async def _whole(self, turn: _Turn) -> RequestOutput:
        return await only(await self._generate(turn, OutputKind.FINAL_ONLY))

    async def _started(self, turn: _Turn) -> AsyncIterator[RequestOutput]:
        return await with_first(await self._generate(turn, OutputKind.DELTA))
