"""Parses a model's text into reasoning, content and calls of functions. Works on text alone: no engine, no HTTP.

`AnswerParser` parses one answer, whole or as it streams. `FORMATS` are the formats in which models write calls,
`REASONING_FORMATS` those of reasoning; `find_tool_format` and `find_reasoning_format` find a model's format by its chat
template.
"""

from sensorium.parsing.answer import AnswerParser
from sensorium.parsing.detect import check_names, find_reasoning_format, find_tool_format
from sensorium.parsing.events import (
    Content,
    Event,
    ParsedAnswer,
    ParsedCall,
    Reasoning,
    ToolCallArguments,
    ToolCallStart,
    collect,
)
from sensorium.parsing.formats import FORMATS, ToolFormat
from sensorium.parsing.reasoning import REASONING_FORMATS, ReasoningFormat
from sensorium.parsing.tools import Tool, Tools

__all__ = [
    "FORMATS",
    "REASONING_FORMATS",
    "AnswerParser",
    "Content",
    "Event",
    "ParsedAnswer",
    "ParsedCall",
    "Reasoning",
    "ReasoningFormat",
    "Tool",
    "ToolCallArguments",
    "ToolCallStart",
    "ToolFormat",
    "Tools",
    "check_names",
    "collect",
    "find_reasoning_format",
    "find_tool_format",
]
