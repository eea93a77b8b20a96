"""Writes grammars in llguidance's form of Lark, rule by rule.

Marks that are special tokens are written in a grammar by their ids, because llguidance doesn't match such tokens as
text; other marks are literals. Source: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""White space as `json.dumps` writes it: with free white space, a model may write spaces for ever."""


class Lark:
    """A grammar that grows.

    `token_ids`: the ids of marks that are special tokens.
    """

    def __init__(self, token_ids: Mapping[str, int]) -> None:
        self._token_ids = token_ids
        longest_first = sorted(token_ids, key=len, reverse=True)
        self._marks = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if token_ids else None
        self._lines: list[str] = ["TEXT: /(.|\\n)*/"]

    def is_token(self, mark: str) -> bool:
        """Whether a mark is a special token."""
        return mark in self._token_ids

    def text(self, text: str) -> str:
        """An expression for exactly this text."""
        pieces = self._marks.split(text) if self._marks is not None else [text]
        return " ".join(
            f"<[{self._token_ids[piece]}]>" if piece in self._token_ids else json.dumps(piece, ensure_ascii=False)
            for piece in pieces
            if piece
        )

    def rule(self, body: str, *, lazy: bool = False) -> str:
        """A rule of its own; returns its name. A lazy one matches as little as it can."""
        name = f"r{len(self._lines)}"
        self._lines.append(f"{name}{'[lazy]' if lazy else ''}: {body}")
        return name

    def json(self, schema: Mapping[str, Any], *, is_strict: bool) -> str:
        """An expression for what a JSON schema describes. Unless strict, parts of it that can't be enforced are
        ignored."""
        styled = {**schema, "x-guidance": {**_JSON_STYLE, "lenient": not is_strict}}
        return self.rule("%json " + json.dumps(styled, ensure_ascii=False))

    def text_to(self, end: str) -> str:
        """An expression for any text up to the first `end`, and `end` itself."""
        if any(end.startswith(mark) for mark in self._token_ids):
            return self.rule(f"TEXT {self.text(end)}")
        return self.rule(f"TEXT {json.dumps(end, ensure_ascii=False)}", lazy=True)

    def grammar(self, start: str) -> str:
        """The whole grammar, whose answers are those of the expression `start`."""
        return "\n".join((f"start: {start}", *self._lines))
