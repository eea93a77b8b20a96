"""From the JSON schemas in a grammar to ones that the library compiles to what they mean."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

from llguidance import LLTokenizer

from sensorium.grammar.schemas import big_numbers, dead_ends, meaning, numbers, unions

_JSON = re.compile(r'(?P<text>"(?:\\.|[^"\\\n])*"|/(?!/)(?:\\.|[^/\\\n])+/|//[^\n]*|#[^\n]*)|%json\s*(?=\{)')
"""Where a schema begins in a grammar; texts, expressions and comments are passed over."""
_DECODER = json.JSONDecoder()


def with_ready_schemas(lark: str, tokenizer: LLTokenizer) -> str:
    """A grammar in the library's form of Lark, in which `%json {...}` means what JSON Schema says.

    Raises:
        ValueError: One of the schemas can't be held to. The message says why, and names keywords of it only.
    """
    pieces: list[str] = []
    rules: list[str] = []
    at = 0
    while (found := _next(lark, at)) is not None:
        begin, schema, end = found
        expression, more = _ready(schema, f"exact{len(pieces)}x", tokenizer)
        pieces += [lark[at:begin], expression]
        rules += more
        at = end
    return "\n".join(["".join([*pieces, lark[at:]]), *rules])


def _next(lark: str, at: int) -> tuple[int, dict[str, Any], int] | None:
    """The next schema: where it begins with its mark, what it is, where it ends."""
    while (found := _JSON.search(lark, at)) is not None:
        at = found.end()
        if found["text"] is None:
            try:
                schema, end = _DECODER.raw_decode(lark, at)
            except (ValueError, RecursionError):
                continue  # the library says what is wrong
            return found.start(), schema, end
    return None


def _ready(schema: dict[str, Any], prefix: str, tokenizer: LLTokenizer) -> tuple[str, list[str]]:
    """An expression for a schema, and the rules that it uses."""
    root = copy.deepcopy(schema)
    meaning.correct(root)
    unions.resolve(root)
    numbers.tighten(root)
    root = dead_ends.remove(root, tokenizer)
    if not big_numbers.has_big_constants(root):
        return f"%json {json.dumps(root, ensure_ascii=False)}", []
    writer = big_numbers.Writer(root, prefix)
    return writer.expression(root), writer.rules
