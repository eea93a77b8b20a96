"""One turn of a conversation: what a body adds to what was said before."""

from __future__ import annotations

from typing import Any

from sensorium.entrypoints.openai.responses.body import ResponseBody
from sensorium.entrypoints.openai.responses.conversation import Conversation
from sensorium.entrypoints.openai.responses.items import Item
from sensorium.entrypoints.openai.responses.store import KeptItem, KeptResponse
from sensorium.entrypoints.openai.tools.plan import AnswerPlan
from sensorium.errors import InvalidRequestError


class Turn:
    """A request on its way.

    Raises:
        RequestError: There is nothing to answer, a tool can't be offered, or an item refers to one that isn't there.
    """

    plan: AnswerPlan
    """How the answer is taken apart; known once the prompt is rendered."""

    def __init__(
        self, tenant: bytes, body: ResponseBody, earlier: tuple[KeptItem, ...], given: list[Item], *, is_stored: bool
    ) -> None:
        if not earlier and not given:
            raise InvalidRequestError("got nothing, expected a text or items. Add input.", field="input")
        self.tenant = tenant
        self.body = body
        self.is_stored = is_stored
        self.tools = body.tool_request()
        self._earlier = earlier
        self._given = given
        self._conversation = Conversation(body.instructions)
        self._conversation.add([item.content for item in earlier], "previous_response_id.input")
        self._conversation.add(given, "input")

    @property
    def messages(self) -> list[Any]:
        """The conversation as a chat."""
        return self._conversation.messages

    def render_options(self) -> dict[str, Any]:
        """Options of `ChatRenderer.render`."""
        reasoning = self.body.reasoning
        return {
            "places": self._conversation.places,
            "tools": None if self.tools is None else [tool.described() for tool in self.tools.tools],
            "reasoning_effort": None if reasoning is None else reasoning.effort,
            "effort_field": "reasoning.effort",
            "chat_template_kwargs": self.body.chat_template_kwargs,
            "mm_processor_kwargs": self.body.mm_processor_kwargs,
        }

    def with_answer(self, response: dict[str, Any]) -> KeptResponse:
        """All that is kept."""
        output = tuple(map(KeptItem, response["output"]))
        return KeptResponse(response, self._earlier, tuple(map(KeptItem, self._given)), output)
