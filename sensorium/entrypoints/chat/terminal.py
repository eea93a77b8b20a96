"""Reading lines and writing answers: with editing and dim remarks in a terminal, plainly in a pipe."""

from __future__ import annotations

import glob
import os
import sys
from pathlib import Path

_QUOTES = '"""'


class Terminal:
    """Standard input and output. `is_interactive` if both belong to a terminal."""

    def __init__(self) -> None:
        self.is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._has_style = self.is_interactive and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        if self.is_interactive:
            _prepare_editing()

    def read(self) -> str | None:
        """The next line; several if they stand between lines of three quotes, or if lines end with a backslash.

        None at the end of the input. Raises `KeyboardInterrupt`.
        """
        line = self._read_one("> ")
        if line is None:
            return None
        if line.strip().startswith(_QUOTES):
            return self._quoted(line.strip().removeprefix(_QUOTES))
        while line.endswith("\\") and (more := self._read_one(". ")) is not None:
            line = f"{line[:-1]}\n{more}"
        return line

    def write(self, text: str, *, is_dim: bool = False) -> None:
        """Show a piece of an answer at once."""
        sys.stdout.write(f"\x1b[2m{text}\x1b[22m" if is_dim and self._has_style and text else text)
        sys.stdout.flush()

    def remark(self, text: str) -> None:
        """Print a remark about the chat itself; in a pipe only answers are printed."""
        if self.is_interactive:
            self.write(f"{text}\n", is_dim=True)

    def complain(self, text: str) -> None:
        """Report an error."""
        sys.stdout.flush()
        print(f"sensorium: {text}", file=sys.stderr, flush=True)

    def _read_one(self, prompt: str) -> str | None:
        if not self.is_interactive:
            line = sys.stdin.readline()
            return line.rstrip("\r\n") if line else None
        try:
            return input(prompt)
        except EOFError:
            self.write("\n")
            return None

    def _quoted(self, first: str) -> str:
        lines = [first] if first else []
        while not (lines and lines[-1].rstrip().endswith(_QUOTES)):
            more = self._read_one(". ")
            if more is None:
                return "\n".join(lines)
            lines.append(more)
        return "\n".join(lines).rstrip().removesuffix(_QUOTES).rstrip("\n")


def _prepare_editing() -> None:
    """Set up line editing, history, and completion of paths. Without the readline module, lines are read plainly."""
    try:
        import readline
    except ImportError:
        return
    readline.set_completer(_complete)
    readline.set_completer_delims(" \t\n@")
    readline.parse_and_bind("tab: complete")


def _complete(text: str, state: int) -> str | None:
    start = os.path.expanduser(text)
    found = sorted(path + "/" if Path(path).is_dir() else path for path in glob.glob(glob.escape(start) + "*"))
    return found[state].replace(" ", "\\ ") if state < len(found) else None
