"""A conversation: its messages so far, in OpenAI's format, and as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sensorium.entrypoints.chat.attachments import Attachment
from sensorium.entrypoints.chat.lines import Content
from sensorium.errors import InvalidRequestError

Messages = list[dict[str, Any]]


class Conversation:
    """Turns of a user and an assistant behind an optional system text. A turn enters once it is complete."""

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self._turns: list[tuple[str, Content]] = []

    def with_question(self, question: Content) -> Messages:
        """All messages and one more, which isn't stored."""
        return [*self._system(), *(_message(role, said) for role, said in [*self._turns, ("user", question)])]

    def add(self, question: Content, answer: str) -> None:
        """Store a question and its answer."""
        self._turns += [("user", question), ("assistant", [answer])]

    def reset(self) -> None:
        """Forget all turns; the system text stays."""
        self._turns.clear()

    @property
    def num_turns(self) -> int:
        """Questions asked."""
        return len(self._turns) // 2

    def save(self, path: str) -> None:
        """Write the messages as JSON, media by name. Raises `InvalidRequestError`."""
        messages = [*self._system(), *(_message(role, said, by_name=True) for role, said in self._turns)]
        try:
            Path(path).expanduser().write_text(
                json.dumps({"messages": messages}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        except OSError as error:
            raise InvalidRequestError(
                f"got {path!r}, expected a file to write ({error.strerror}).", field="save"
            ) from None

    def _system(self) -> Messages:
        return [{"role": "system", "content": self.system}] if self.system else []


def _message(role: str, said: Content, *, by_name: bool = False) -> dict[str, Any]:
    """One message; plain text stays a string, because every template takes strings."""
    if all(isinstance(each, str) for each in said):
        return {"role": role, "content": "\n".join(map(str, said))}
    return {"role": role, "content": [_part(each, by_name) for each in said]}


def _part(each: str | Attachment, by_name: bool) -> dict[str, Any]:
    if isinstance(each, str):
        return {"type": "text", "text": each}
    return each.named_part if by_name else each.part
