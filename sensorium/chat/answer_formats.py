"""How a model's answers are parsed: determined once per chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sensorium.chat.template import render
from sensorium.errors import InvalidRequestError, UnsupportedFeatureError
from sensorium.logger import get_logger
from sensorium.parsing import FORMATS, ReasoningFormat, ToolFormat, find_reasoning_format, find_tool_format
from sensorium.parsing.detect import AUTO, NONE, check_names, shows_tools

logger = get_logger(__name__)

FALLBACK = FORMATS["hermes"]
"""The format of calls for models whose templates don't support tools: the messages explain it to them."""
_MAX_TEMPLATES = 64


@dataclass(frozen=True, slots=True, eq=False)
class AnswerFormats:
    """What to look for in the answers to prompts of one template."""

    tool_format: ToolFormat | None
    reasoning: ReasoningFormat | None
    shows_tools: bool
    """The template renders tools and past calls."""
    token_ids: Mapping[str, int]
    """Marks that are special tokens."""
    why_no_tools: str = ""
    """The error for a request with tools if no format of calls is known."""

    def calls(self) -> ToolFormat:
        """The format of calls. Raises `UnsupportedFeatureError` if there is none."""
        if self.tool_format is None:
            raise UnsupportedFeatureError(f"got functions, expected none, since {self.why_no_tools}", field="tools")
        return self.tool_format

    def is_reasoning_open(self, prompt: str, *, is_continued: bool = False) -> bool:
        """Whether an answer to this prompt begins within reasoning. `is_continued`: the prompt holds its beginning."""
        return self.reasoning is not None and self.reasoning.is_open_in(prompt, is_continued=is_continued)

    def reasoning_end_id(self) -> int | None:
        """The token that ends reasoning, where it is one."""
        return None if self.reasoning is None else self.token_ids.get(self.reasoning.end)


class AnswerFormatsFinder:
    """Finds the formats of templates, and caches them. Safe to call from several threads.

    Args:
        tokenizer: renders the templates.
        tool_parser: a form's name, "none", or "auto" to go by the template.
        reasoning_parser: the same for reasoning.

    Raises:
        ConfigError: There is no format of such a name.
    """

    def __init__(self, tokenizer: Any, tool_parser: str = AUTO, reasoning_parser: str = AUTO) -> None:
        check_names(tool_parser, reasoning_parser)
        self._tokenizer = tokenizer
        self._tool_parser = tool_parser
        self._reasoning_parser = reasoning_parser
        self.formats_of = lru_cache(maxsize=_MAX_TEMPLATES)(self._formats_of)
        self.reasoning_of = lru_cache(maxsize=_MAX_TEMPLATES)(self._reasoning_of)

    def _reasoning_of(self, template: str) -> AnswerFormats:
        """The formats for requests without tools; renders nothing."""
        reasoning = find_reasoning_format(template, self._reasoning_parser)
        return AnswerFormats(None, reasoning, False, self._token_ids(None, reasoning))

    def _formats_of(self, template: str) -> AnswerFormats:
        """The formats for requests with tools."""

        def render_probe(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> str | None:
            try:
                return render(self._tokenizer, template, messages, tools=tools or None)
            except InvalidRequestError:
                return None

        reasoning = find_reasoning_format(template, self._reasoning_parser)
        has_place = shows_tools(template, render_probe)
        tool_format = find_tool_format(template, render_probe, self._tool_parser)
        why = ""
        if self._tool_parser == NONE:
            why = "they are switched off here. The operator can set --tool-parser."
        elif not has_place:
            if self._tool_parser not in (AUTO, FALLBACK.name):
                why = (
                    f"the model's chat template tells it of none. The operator can set --tool-parser {FALLBACK.name}, "
                    "or --chat-template."
                )
            tool_format = None if why else FALLBACK
        elif tool_format is None:
            why = "it isn't known how this model writes calls. The operator can set --tool-parser."
        found = AnswerFormats(tool_format, reasoning, has_place, self._token_ids(tool_format, reasoning), why)
        logger.info(
            "chat template: tools %s, calls as %s, reasoning as %s",
            "have a place" if has_place else "are told of in messages",
            tool_format.name if tool_format else "nothing known",
            reasoning.name if reasoning else "nothing known",
        )
        return found

    def _token_ids(self, tool_format: ToolFormat | None, reasoning: ReasoningFormat | None) -> dict[str, int]:
        marks = [
            *(tool_format.markers if tool_format else ()),
            *((reasoning.begin, reasoning.end) if reasoning else ()),
        ]
        added = self._tokenizer.get_added_vocab()
        return {mark: added[mark] for mark in marks if mark in added}
