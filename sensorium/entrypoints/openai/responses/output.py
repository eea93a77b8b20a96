"""The items of an answer as it grows, and the events that tell of them, in OpenAI's order.

    output_item.added, content_part.added, output_text.delta ..., output_text.done, content_part.done, output_item.done

One item is open at a time: what is of another kind closes it. An answer that is given whole is what its events say.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sensorium.entrypoints.openai.responses.items import Item, new_id

Event = dict[str, Any]


class OutputWriter:
    """Collects an answer. Every method returns the events that it causes, without their sequence numbers."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        """In order; the last one may be open."""
        self._open: _OpenItem | None = None

    def text(self, delta: str, logprobs: list[Item]) -> Iterator[Event]:
        """More text, with the log probabilities of its tokens."""
        message = self._open
        if not isinstance(message, _Message):
            message = _Message(len(self.items))
            yield from self._begin(message)
        yield from message.more(delta, logprobs)

    def more_logprobs(self, logprobs: list[Item]) -> Iterator[Event]:
        """Log probabilities of tokens at the end of the text, which show as nothing."""
        if logprobs and isinstance(self._open, _Message):
            yield from self._open.more("", logprobs)

    def reasoning(self, delta: str) -> Iterator[Event]:
        """More of what the model wrote for itself."""
        reasoning = self._open
        if not isinstance(reasoning, _Reasoning):
            reasoning = _Reasoning(len(self.items))
            yield from self._begin(reasoning)
        yield from reasoning.more(delta)

    def call(self, name: str, call_id: str) -> Iterator[Event]:
        """A call of a function begins."""
        yield from self._begin(_Call(len(self.items), name, call_id))

    def call_arguments(self, delta: str) -> Iterator[Event]:
        """More of the arguments of the last call."""
        assert isinstance(self._open, _Call)
        yield from self._open.more(delta)

    def end(self, status: str) -> Iterator[Event]:
        """The answer ends; an answer of nothing is an empty message. `status`: of the last item."""
        if not any(item["type"] != "reasoning" for item in self.items):
            yield from self.text("", [])
        yield from self._close(status)

    def _begin(self, item: _OpenItem) -> Iterator[Event]:
        yield from self._close("completed")
        self._open = item
        self.items.append(item.content)
        yield item.event("output_item.added", item=item.snapshot())
        yield from item.opened()

    def _close(self, status: str) -> Iterator[Event]:
        if self._open is None:
            return
        item, self._open = self._open, None
        yield from item.closed()
        item.content["status"] = status
        yield {"type": "response.output_item.done", "output_index": item.index, "item": item.snapshot()}


class _OpenItem:
    """An item that grows."""

    def __init__(self, index: int, content: Item) -> None:
        self.index = index
        self.content = content
        self.pieces: list[str] = []

    def event(self, kind: str, **fields: Any) -> Event:
        """An event about the item."""
        named = {} if kind.startswith("output_item") else {"item_id": self.content["id"]}
        return {"type": f"response.{kind}", **named, "output_index": self.index, **fields}

    def snapshot(self) -> Item:
        """The item as it stands."""
        return {key: list(value) if isinstance(value, list) else value for key, value in self.content.items()}

    def opened(self) -> Iterator[Event]:
        """Events behind `output_item.added`."""
        yield from ()

    def closed(self) -> Iterator[Event]:
        """Events before `output_item.done`; completes the item."""
        yield from ()


class _Message(_OpenItem):
    """Text for the user: one part."""

    def __init__(self, index: int) -> None:
        super().__init__(
            index,
            {"id": new_id("msg"), "type": "message", "status": "in_progress", "role": "assistant", "content": []},
        )
        self._logprobs: list[Item] = []

    def opened(self) -> Iterator[Event]:
        yield self.event("content_part.added", content_index=0, part=self._part())

    def more(self, delta: str, logprobs: list[Item]) -> Iterator[Event]:
        """A piece of the text."""
        self.pieces.append(delta)
        self._logprobs += logprobs
        if delta or logprobs:
            yield self.event("output_text.delta", content_index=0, delta=delta, logprobs=logprobs)

    def closed(self) -> Iterator[Event]:
        part = self._part()
        self.content["content"] = [part]
        yield self.event("output_text.done", content_index=0, text=part["text"], logprobs=part["logprobs"])
        yield self.event("content_part.done", content_index=0, part=part)

    def _part(self) -> Item:
        text = "".join(self.pieces)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(self._logprobs)}


class _Reasoning(_OpenItem):
    """Text that the model wrote for itself: one part."""

    def __init__(self, index: int) -> None:
        super().__init__(
            index, {"id": new_id("rs"), "type": "reasoning", "status": "in_progress", "summary": [], "content": []}
        )

    def opened(self) -> Iterator[Event]:
        yield self.event("content_part.added", content_index=0, part=self._part())

    def more(self, delta: str) -> Iterator[Event]:
        """A piece of the text."""
        self.pieces.append(delta)
        yield self.event("reasoning_text.delta", content_index=0, delta=delta)

    def closed(self) -> Iterator[Event]:
        part = self._part()
        self.content["content"] = [part]
        yield self.event("reasoning_text.done", content_index=0, text=part["text"])
        yield self.event("content_part.done", content_index=0, part=part)

    def _part(self) -> Item:
        return {"type": "reasoning_text", "text": "".join(self.pieces)}


class _Call(_OpenItem):
    """A call of a function."""

    def __init__(self, index: int, name: str, call_id: str) -> None:
        call = {"call_id": call_id, "name": name, "arguments": ""}
        super().__init__(index, {"id": new_id("fc"), "type": "function_call", "status": "in_progress", **call})

    def more(self, delta: str) -> Iterator[Event]:
        """A piece of the arguments."""
        self.pieces.append(delta)
        yield self.event("function_call_arguments.delta", delta=delta)

    def closed(self) -> Iterator[Event]:
        arguments = self.content["arguments"] = "".join(self.pieces)
        yield self.event("function_call_arguments.done", name=self.content["name"], arguments=arguments)
