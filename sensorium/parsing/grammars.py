"""Grammars that hold a model to calls: to make some, or to make none but proper ones.

Each format says how one call is written; here stands what may come before, between and after calls.
"""

from __future__ import annotations

from collections.abc import Mapping

from sensorium.parsing.formats import ToolFormat
from sensorium.parsing.lark import Lark
from sensorium.parsing.reasoning import ReasoningFormat
from sensorium.parsing.tools import Tools

_LINE_BREAKS = "/\\n{0,2}/"
"""What models put between reasoning and what follows."""


def forced_calls(
    tool_format: ToolFormat,
    tools: Tools,
    token_ids: Mapping[str, int],
    *,
    is_parallel: bool,
    reasoning: ReasoningFormat | None = None,
    is_behind_reasoning: bool = False,
) -> str:
    """Answers that are one call of one of the tools, or, if parallel, any number of them from one on.

    Args:
        tool_format: how the model writes calls.
        tools: those that may be called.
        token_ids: of marks that are tokens of their own.
        is_parallel: several calls may follow one another.
        reasoning: the model may reason first, between these marks; None: not within this grammar.
        is_behind_reasoning: the grammar holds from where reasoning has ended.
    """
    lark = Lark(token_ids)
    calls = tool_format.calls(lark, tools, is_parallel=is_parallel)
    return lark.grammar(f"{_before(lark, reasoning, is_behind_reasoning)}{calls}")


def proper_calls(
    tool_format: ToolFormat,
    tools: Tools,
    token_ids: Mapping[str, int],
    *,
    is_parallel: bool,
    reasoning: ReasoningFormat | None = None,
    is_behind_reasoning: bool = False,
) -> str:
    """Any text, in which whatever begins as a call is a proper one. For the arguments, see `forced_calls`."""
    lark = Lark(token_ids)
    answer = tool_format.text_and_calls(lark, tools, is_parallel=is_parallel)
    return lark.grammar(f"{_before(lark, reasoning, is_behind_reasoning)}{answer}")


def _before(lark: Lark, reasoning: ReasoningFormat | None, is_behind_reasoning: bool) -> str:
    if is_behind_reasoning:
        return f"{lark.rule(_LINE_BREAKS)} "
    if reasoning is None:
        return ""
    thinking = lark.rule(f"{lark.text(reasoning.begin)} {lark.text_to(reasoning.end)} {_LINE_BREAKS}")
    return f"{thinking}? "
