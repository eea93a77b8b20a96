"""Text that a model writes for itself before it answers, between two marks.

Qwen 3, DeepSeek, GLM and most others     <think> ... </think>
Seed-OSS                                  <seed:think> ... </seed:think>
Magistral                                 [THINK] ... [/THINK], special tokens

With some templates the model writes the first mark; with others the prompt ends with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from sensorium.parsing.reader import WHITESPACE, Reader, Steps
from sensorium.parsing.sink import Sink


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """A pair of marks."""

    name: str
    begin: str
    end: str

    def is_open_in(self, prompt: str, *, is_continued: bool = False) -> bool:
        """Whether a rendered prompt ends within reasoning, so that the answer begins with it.

        `is_continued`: the prompt ends with the beginning of an answer, which may hold reasoning.
        """
        if is_continued and self.begin in prompt:
            return prompt.rindex(self.begin) > prompt.rfind(self.end)
        return prompt.rstrip().endswith(self.begin)

    def read(self, reader: Reader, sink: Sink, *, is_open: bool) -> Steps[None]:
        """Read the reasoning at the beginning of an answer, if there is any."""
        space = yield from reader.run(WHITESPACE)
        has_begin = yield from reader.take(self.begin)  # some models repeat it
        if not is_open and not has_begin:
            sink.content(space)
            return
        yield from reader.until((self.end,), sink.reasoning)
        sink.end_reasoning()


REASONING_FORMATS: Mapping[str, ReasoningFormat] = MappingProxyType(
    {
        each.name: each
        for each in (
            ReasoningFormat("seed", "<seed:think>", "</seed:think>"),
            ReasoningFormat("mistral", "[THINK]", "[/THINK]"),
            ReasoningFormat("think", "<think>", "</think>"),
        )
    }
)
"""The formats by name. Chat templates are searched for them in this order."""
