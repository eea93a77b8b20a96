"""The chat itself: a line is a command or a question, a question has an answer."""

from __future__ import annotations

import time
from collections.abc import Callable

from sensorium.entrypoints.chat.answers import LoopThread
from sensorium.entrypoints.chat.attachments import MODALITIES, Attachment, attach
from sensorium.entrypoints.chat.backends import Backend
from sensorium.entrypoints.chat.conversation import Conversation
from sensorium.entrypoints.chat.lines import Content, parse_line, paths_of
from sensorium.entrypoints.chat.terminal import Terminal
from sensorium.errors import EngineDeadError, InvalidRequestError, SensoriumError

HELP = """\
/image PATH...   send a picture with the next message; so do /video and /audio, and @PATH within a message
/system TEXT     set the system text; without a text, show it
/reset           forget the conversation
/save FILE       write the conversation as JSON
/help            show this
/quit            leave; so does Ctrl-D
Ctrl-C stops an answer. A line that ends with a backslash goes on; three quotes begin and end several lines."""


class ChatSession:
    """Reads lines until the input ends."""

    def __init__(self, loop: LoopThread, backend: Backend, terminal: Terminal, system: str | None = None) -> None:
        self._loop = loop
        self._backend = backend
        self._terminal = terminal
        self._conversation = Conversation(system)
        self._waiting: list[Attachment] = []
        self._has_failed = False
        self._has_quit = False
        self._commands: dict[str, Callable[[str], None]] = {
            "system": self._set_system,
            "reset": self._reset,
            "save": self._save,
            "help": lambda _: self._terminal.write(HELP + "\n"),
            "quit": self._quit,
            "exit": self._quit,
            **{modality: self._attacher(modality) for modality in MODALITIES},
        }

    def run(self) -> int:
        """Chat. Returns the exit status: in a pipe 1 if anything failed.

        Raises:
            EngineDeadError: The engine has ended.
        """
        self._terminal.remark(f"{self._backend.model}. /help for help.")
        while not self._has_quit:
            try:
                line = self._terminal.read()
                if line is None:
                    break
                self._take(line)
            except KeyboardInterrupt:
                self._terminal.remark("\n(/quit or Ctrl-D to leave)")
            except EngineDeadError:
                raise
            except SensoriumError as error:
                self._has_failed = True
                self._terminal.complain(str(error))
        return int(self._has_failed and not self._terminal.is_interactive)

    def _take(self, line: str) -> None:
        if not line.strip():
            return
        word, _, rest = line.strip().partition(" ")
        if word[0] == "/" and "/" not in word[1:] and "." not in word:
            if word[1:] not in self._commands:
                raise InvalidRequestError(f"got {word!r}, expected one of those that /help lists.", field="command")
            self._commands[word[1:]](rest.strip())
            return
        content = parse_line(line)
        if all(isinstance(each, Attachment) for each in content):
            self._attach([each for each in content if isinstance(each, Attachment)])
            return
        question: Content = [*self._waiting, *content]
        self._answer(question)
        self._waiting.clear()

    def _answer(self, question: Content) -> None:
        """Show an answer as it arrives. A stopped answer is stored as far as it came; a failed one is not."""
        texts: list[str] = []
        start_s, first_s, num_tokens = time.monotonic(), 0.0, 0
        was_reasoning = False
        try:
            for piece in self._loop.answer(self._backend, self._conversation.with_question(question)):
                first_s = first_s or time.monotonic()
                num_tokens += piece.num_tokens
                if piece.is_reasoning:
                    if self._terminal.is_interactive:
                        self._terminal.write(piece.text, is_dim=True)
                        was_reasoning = True
                    continue
                if was_reasoning and piece.text:
                    self._terminal.write("\n")
                    was_reasoning = False
                texts.append(piece.text)
                self._terminal.write(piece.text)
        except KeyboardInterrupt:
            self._terminal.remark(" (stopped)")
        except BaseException:
            if texts:
                self._terminal.write("\n")
            raise
        else:
            self._terminal.write("\n")
            self._terminal.remark(_times(start_s, first_s, num_tokens))
        if any(texts):  # some templates refuse a conversation that has a turn without an answer
            self._conversation.add(question, "".join(texts))

    def _attacher(self, modality: str) -> Callable[[str], None]:
        return lambda rest: self._attach([attach(path, modality) for path in paths_of(rest)])

    def _attach(self, attachments: list[Attachment]) -> None:
        self._waiting += attachments
        for each in attachments:
            size = "" if each.data is None else f", {len(each.data):,} bytes"
            self._terminal.remark(f"{each.modality} {each.name}{size}: goes with the next message")

    def _set_system(self, text: str) -> None:
        if text:
            self._conversation.system = text
        else:
            self._terminal.write(f"{self._conversation.system or '(no system text)'}\n")

    def _reset(self, _: str) -> None:
        self._conversation.reset()
        self._waiting.clear()
        self._terminal.remark("forgotten")

    def _save(self, path: str) -> None:
        if not path:
            raise InvalidRequestError("got no path, expected a file. Give a path.", field="save")
        self._conversation.save(path)
        self._terminal.remark(f"{self._conversation.num_turns} turns written to {path}")

    def _quit(self, _: str) -> None:
        self._has_quit = True


def _times(start_s: float, first_s: float, num_tokens: int) -> str:
    """Statistics of an answer, for display."""
    end_s = time.monotonic()
    first_s = first_s or end_s
    rate = f", then {(num_tokens - 1) / (end_s - first_s):.0f} tok/s" if num_tokens > 1 and end_s > first_s else ""
    return f"[{num_tokens} tokens; first after {first_s - start_s:.2f} s{rate}]"
