"""Where the prompts of `sensorium generate` come from: arguments, a file, or standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sensorium.entrypoints.chat.attachments import Attachment
from sensorium.entrypoints.chat.conversation import Conversation, Messages
from sensorium.errors import InvalidRequestError

_SHOWN_CHARS = 72


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as text, or as a conversation of its own."""

    text: str = ""
    messages: Messages | None = None

    @property
    def shown(self) -> str:
        """One line of it, for display."""
        line = " ".join((self.text or json.dumps(self.messages, ensure_ascii=False)).split())
        return line if len(line) <= _SHOWN_CHARS else line[: _SHOWN_CHARS - 1] + "…"

    def chat(self, system: str | None, media: Sequence[Attachment]) -> Messages:
        """The messages to send; media go in front of the last message's text."""
        if self.messages is None:
            return Conversation(system).with_question([*media, self.text])
        if media:
            raise InvalidRequestError(
                "got a path beside messages, expected media within them. Put them there.", field="media"
            )
        return [*([{"role": "system", "content": system}] if system else []), *self.messages]


def read_prompts(arguments: Sequence[str], path: str | None) -> list[Prompt]:
    """All prompts in order. Raises `InvalidRequestError`."""
    prompts = [Prompt(text) for text in arguments]
    if path is not None:
        prompts += _of_file(path)
    elif not prompts and not sys.stdin.isatty():
        prompts = [Prompt(text)] if (text := sys.stdin.read().strip()) else []
    if not prompts:
        raise InvalidRequestError(
            "got none, expected at least one. Give it as argument, --file or on stdin.", field="prompt"
        )
    return prompts


def _of_file(path: str) -> list[Prompt]:
    try:
        lines = (sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(
            f"got {path!r}, expected a text file ({type(error).__name__}).", field="file"
        ) from None
    parse = _of_json if path.endswith(".jsonl") else lambda line, _: Prompt(line)
    return [parse(line, number) for number, line in enumerate(lines, 1) if line.strip()]


def _of_json(line: str, number: int) -> Prompt:
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict):
        if found.keys() == {"prompt"} and isinstance(found["prompt"], str):
            return Prompt(found["prompt"])
        if found.keys() == {"messages"} and isinstance(found["messages"], list):
            return Prompt(messages=found["messages"])
    raise InvalidRequestError(
        f"got a line {number} that can't be read, expected an object with prompt or messages. Correct it.", field="file"
    )
