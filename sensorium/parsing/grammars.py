"""Grammars that constrain a model's calls: that it makes some, or that those it makes are valid.

Each format has the grammar of one call; this module adds what may come before, between and after calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto
from typing import Any

from sensorium.parsing.formats import ToolFormat
from sensorium.parsing.lark import Lark
from sensorium.parsing.reasoning import ReasoningFormat
from sensorium.parsing.tools import Tools

_LINE_BREAKS = "/\\n{0,2}/"
"""The white space that models put after reasoning."""


class Held(Enum):
    """What an answer must consist of."""

    CALLS = auto()
    """Calls, at least one."""
    PROPER = auto()
    """Any text; every call in it is valid."""
    EITHER = auto()
    """Calls, or JSON of a schema."""


def answer_grammar(
    tool_format: ToolFormat,
    tools: Tools,
    token_ids: Mapping[str, int],
    *,
    held: Held,
    is_parallel: bool,
    schema: Mapping[str, Any] | None = None,
    reasoning: ReasoningFormat | None = None,
    is_behind_reasoning: bool = False,
) -> str:
    """A grammar, in llguidance's form of Lark, of whole answers.

    Args:
        tool_format: how the model writes calls.
        tools: those that may be called. token_ids: the ids of marks that are special tokens. held: what an answer must
        be. is_parallel: several calls may follow one another. schema: of the JSON that an answer may be instead.
        reasoning: the model may reason first, between these marks; None: not within this grammar. is_behind_reasoning:
        the grammar applies after the end of reasoning.
    """
    lark = Lark(token_ids)
    if held is Held.PROPER:
        answer = tool_format.text_and_calls(lark, tools, is_parallel=is_parallel)
    else:
        answer = tool_format.calls(lark, tools, is_parallel=is_parallel)
    if held is Held.EITHER:
        answer = f"({answer} | {lark.json(schema or {}, is_strict=True)})"
    return lark.grammar(f"{_before(lark, reasoning, is_behind_reasoning)}{answer}")


def json_grammar(schema: Mapping[str, Any], token_ids: Mapping[str, int], reasoning: ReasoningFormat) -> str:
    """A grammar of answers that are JSON of a schema, behind reasoning if the model reasons."""
    lark = Lark(token_ids)
    return lark.grammar(f"{_before(lark, reasoning, False)}{lark.json(schema, is_strict=True)}")


def _before(lark: Lark, reasoning: ReasoningFormat | None, is_behind_reasoning: bool) -> str:
    if is_behind_reasoning:
        return f"{lark.rule(_LINE_BREAKS)} "
    if reasoning is None:
        return ""
    thinking = lark.rule(f"{lark.text(reasoning.begin)} {lark.text_to(reasoning.end)} {_LINE_BREAKS}")
    return f"{thinking}? "
