"""`/v1/responses`, and what can be done with one that was kept."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sensorium.chat.template import EFFORT_FIELD
from sensorium.entrypoints.openai.context import ServerContext
from sensorium.entrypoints.openai.errors import HttpError
from sensorium.entrypoints.openai.fields import check_include
from sensorium.entrypoints.openai.http import (
    EventStream,
    JsonResponse,
    beside_loop,
    read_body,
    tenant_of,
    while_connected,
    with_first,
)
from sensorium.entrypoints.openai.numbers import read_count
from sensorium.entrypoints.openai.responses.answer import ResponseAnswer
from sensorium.entrypoints.openai.responses.body import ResponseBody
from sensorium.entrypoints.openai.responses.items import read_items
from sensorium.entrypoints.openai.responses.output import Event
from sensorium.entrypoints.openai.responses.store import KeptItem, KeptResponse, ResponseStore
from sensorium.entrypoints.openai.responses.turn import Turn
from sensorium.entrypoints.openai.tools.plan import AnswerPlan
from sensorium.errors import InvalidRequestError, RequestError, UnsupportedFeatureError
from sensorium.outputs import OutputKind, RequestOutput
from sensorium.sampling_params import SamplingParams

_MAX_PAGE = 100


class ResponseRoutes:
    """Answers with responses, and keeps them."""

    def __init__(self, context: ServerContext, store: ResponseStore) -> None:
        self._context = context
        self._store = store

    def routes(self) -> list[Route]:
        """All routes."""
        return [
            Route("/v1/responses", self.create, methods=["POST"]),
            Route("/v1/responses/input_tokens", self.input_tokens, methods=["POST"]),
            Route("/v1/responses/{id}", self.retrieve, methods=["GET"]),
            Route("/v1/responses/{id}", self.delete, methods=["DELETE"]),
            Route("/v1/responses/{id}/input_items", self.input_items, methods=["GET"]),
        ]

    async def create(self, request: Request) -> Response:
        """`POST /v1/responses`."""
        body = await read_body(request, ResponseBody)
        model = self._context.check_model(body.model)
        turn = await beside_loop(request, lambda: self._turn(request, body))
        params = body.params(self._context.sampling_defaults)
        outputs = await while_connected(request, self._started(request, turn, params))
        answer = ResponseAnswer(body, model, turn.plan, params, is_stored=turn.is_stored)
        if body.stream:
            events = self._kept(answer.stream(outputs), answer, turn)
            return EventStream(events, is_named=True, is_padded=body.options().include_obfuscation)

        async def finish() -> None:
            async with aclosing(self._kept(answer.events(outputs), answer, turn)) as events:  # type: ignore[type-var]
                async for _ in events:
                    pass

        await while_connected(request, finish())
        return JsonResponse(answer.response)

    async def input_tokens(self, request: Request) -> Response:
        """`POST /v1/responses/input_tokens`: the prompt tokens that a body would take; nothing is generated."""
        body = await read_body(request, ResponseBody)
        self._context.check_model(body.model)
        turn = await beside_loop(request, lambda: self._turn(request, body))
        num_tokens = await while_connected(request, self._count(request, turn))
        return JsonResponse({"object": "response.input_tokens", "input_tokens": num_tokens})

    async def retrieve(self, request: Request) -> Response:
        """`GET /v1/responses/<id>`."""
        query = _query(request, "stream", "include_obfuscation")
        for name, value in query.items():
            if value.lower() != "false":
                raise UnsupportedFeatureError(
                    f"got {value!r:.60}, expected false: a response that is kept is given whole. Remove it.",
                    field=name,
                )
        return JsonResponse(self._find(request).body)

    async def delete(self, request: Request) -> Response:
        """`DELETE /v1/responses/<id>`."""
        self._find(request)
        self._store.delete(tenant_of(request), request.path_params["id"])
        return JsonResponse({"id": request.path_params["id"], "object": "response", "deleted": True})

    async def input_items(self, request: Request) -> Response:
        """`GET /v1/responses/<id>/input_items`: what the client sent with it, in pages, the latest first."""
        kept = self._find(request)
        return JsonResponse(_page([item.content for item in kept.earlier + kept.given], request))

    # Inside

    def _turn(self, request: Request, body: ResponseBody) -> Turn:
        """The conversation that a body goes on with. Raises `RequestError`, and 404 for a response that isn't kept."""
        body.check()
        tenant = tenant_of(request)

        def find(item_id: str, where: str) -> dict[str, Any]:
            found = self._store.get_item(tenant, item_id)
            if found is None:
                raise _not_kept(f"{where}.id", item_id, "an item", code="item_not_found")
            return found.content

        given = [] if body.input is None else read_items(body.input, find=find)
        earlier: tuple[KeptItem, ...] = ()
        if body.previous_response_id is not None:
            earlier = self._kept_response(request, body.previous_response_id, "previous_response_id").conversation()
        return Turn(tenant, body, earlier, given, is_stored=body.store is not False and self._store.is_on)

    def _find(self, request: Request) -> KeptResponse:
        return self._kept_response(request, request.path_params["id"], "response")

    def _kept_response(self, request: Request, response_id: str, name: str) -> KeptResponse:
        found = self._store.get(tenant_of(request), response_id)
        if found is None:
            if name == "response":
                raise _not_kept(name, response_id, "a response", code="response_not_found", is_field=False)
            raise _not_kept(name, response_id, "a response", code="previous_response_not_found")
        return found

    async def _render(self, request: Request, turn: Turn) -> dict[str, Any]:
        try:
            return await self._context.render(request, turn.messages, **turn.render_options())
        except RequestError as error:
            if error.is_about(EFFORT_FIELD):
                error.args = (error.message.replace(EFFORT_FIELD, "reasoning.effort"),)
                error.field = "reasoning.effort"
            raise

    async def _count(self, request: Request, turn: Turn) -> int:
        prompt = await self._render(request, turn)
        processed = await self._context.preprocess(request, prompt)
        return processed.num_prompt_tokens

    async def _generate(self, request: Request, turn: Turn, params: SamplingParams) -> AsyncIterator[RequestOutput]:
        """Render the prompt, plan the answer, and open the generator of its outputs."""
        body, tools = turn.body, turn.tools
        prompt = await self._render(request, turn)
        formats = self._context.chat().answer_formats(has_tools=tools is not None)
        turn.plan = AnswerPlan(formats, tools, prompt["prompt"], self._context.tokenizer())
        return self._context.generate(
            request,
            prompt,
            turn.plan.params(params, body.constraint_field()),
            OutputKind.DELTA,
            model=body.model,
            priority=body.priority,
            cache_salt=body.cache_salt,
            in_own_terms=lambda error: body.in_own_terms(turn.plan.blame(error)),
        )

    async def _started(self, request: Request, turn: Turn, params: SamplingParams) -> AsyncIterator[RequestOutput]:
        return await with_first(await self._generate(request, turn, params))

    async def _kept(self, events: AsyncIterator[Event], answer: ResponseAnswer, turn: Turn) -> AsyncIterator[Event]:
        """The same events; the response is kept before the last of them is told."""
        async with aclosing(events):  # type: ignore[type-var]
            async for event in events:
                if turn.is_stored and event["type"] in ("response.completed", "response.incomplete"):
                    self._keep(answer, turn, event)
                yield event

    def _keep(self, answer: ResponseAnswer, turn: Turn, event: Event) -> None:
        if not self._store.put(turn.tenant, answer.id, turn.with_answer(answer.response)):
            event["response"] = answer.not_stored()


def _not_kept(where: str, given: str, kind: str, *, code: str, is_field: bool = True) -> HttpError:
    told = (
        f"got {given!r:.80}, expected the id of {kind} that is kept. Responses are kept in memory, the latest ones: "
        "send the conversation as input."
    )
    if is_field:
        return HttpError(404, told, code=code, field=where)
    return HttpError(404, f"{where}: {told}", code=code)


def _query(request: Request, *known: str) -> dict[str, str]:
    """The parameters of a request, each of which stands there once; and what is to be included, which changes nothing.

    Raises `RequestError`.
    """
    found: dict[str, str] = {}
    included = []
    for name, value in request.query_params.multi_items():
        if name in ("include", "include[]"):  # clients write lists either way
            included.append(value)
            continue
        if name not in known:
            raise InvalidRequestError(
                f"got a parameter that there isn't, expected one of {list(known)}. Remove it.",
                code="unknown_parameter",
                field=name[:60],
            )
        if name in found:
            raise InvalidRequestError("got it twice, expected it once. Remove one.", field=name)
        found[name] = value
    check_include(included)
    return found


def _page(items: list[dict[str, Any]], request: Request) -> dict[str, Any]:
    """Items from `after` on, `limit` of them. Raises `InvalidRequestError`."""
    query = _query(request, "after", "limit", "order")
    limit, order, after = read_count("limit", query.get("limit", "20")), query.get("order", "desc"), query.get("after")
    if not 1 <= limit <= _MAX_PAGE:
        raise InvalidRequestError(f"got {limit}, expected 1 to {_MAX_PAGE}. Change limit.", field="limit")
    if order not in ("asc", "desc"):
        raise InvalidRequestError(f"got {order!r:.60}, expected 'asc' or 'desc'. Change order.", field="order")
    ordered = items if order == "asc" else items[::-1]
    if after is not None:
        places = [index for index, item in enumerate(ordered) if item["id"] == after]
        if not places:
            raise InvalidRequestError(f"got {after!r:.80}, expected the id of an item. Change after.", field="after")
        ordered = ordered[places[0] + 1 :]
    page = ordered[:limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(ordered) > len(page),
    }
