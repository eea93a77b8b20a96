"""The `sensorium` command: finds the subcommand and reports errors in one line.

A subcommand's module is imported when its arguments are needed, so that `sensorium --help` loads nothing.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import sensorium
from sensorium.errors import SensoriumError

_HERE = "sensorium.entrypoints.cli"
_COMMANDS = {
    "serve": (f"{_HERE}.serve", "serve a model over HTTP, as OpenAI's API has it"),
    "chat": (f"{_HERE}.chat", "chat in the terminal, with a model or with a server"),
    "generate": (f"{_HERE}.generate", "answer prompts in this process"),
    "run-batch": (f"{_HERE}.run_batch", "answer a file of requests in OpenAI's batch format"),
    "models": (f"{_HERE}.models", "list the architectures that run, and how"),
    "verify": (f"{_HERE}.verify", "compare what a model computes here with what Hugging Face computes"),
    "new-model": (f"{_HERE}.new_model", "write the beginning of a model file and its test, for a Hugging Face config"),
    "bench": (f"{_HERE}.bench", "measure a server, or a model in this process"),
    "env": (f"{_HERE}.env", "print versions and the machine, for reports of errors"),
}
"""By name: the module with `fill(parser)`, and the help. `fill` sets the default `run`, which takes what was parsed."""


class LazyParser(argparse.ArgumentParser):
    """A parser whose arguments are added by its module once it is asked to parse; flags may stand among them."""

    def __init__(self, *args: Any, module: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._module = module
        self._is_parsing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See argparse."""
        if self._module is not None:
            module, self._module = self._module, None
            importlib.import_module(module).fill(self)
        if self._is_parsing or self._subparsers is not None:
            return super().parse_known_args(args, namespace)
        self._is_parsing = True  # super().__init__ calls this method
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_parsing = False


def add_commands(parser: argparse.ArgumentParser, commands: Mapping[str, tuple[str, str]]) -> None:
    """Add subcommands, given as in `_COMMANDS`."""
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=LazyParser)
    for name, (module, text) in commands.items():
        subparsers.add_parser(name, module=module, help=text, description=f"{text[0].upper()}{text[1:]}.")


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser("sensorium", description="Run and serve multimodal models.")
    parser.add_argument("--version", action="version", version=f"sensorium {sensorium.__version__}")
    add_commands(parser, _COMMANDS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parsed = make_parser().parse_args(arguments)
    try:
        status: int = parsed.run(parsed)
    except SensoriumError as error:
        print(f"sensorium: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of the output has closed it; nobody would see an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
