"""Prompts repeated in front of their completions, with the log probabilities of their tokens.

Evaluation by log-likelihood uses this: how probable is one text after another?
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sensorium.engine.detokenizer import Detokenizer
from sensorium.entrypoints.openai.answers import scored_tokens, token_name
from sensorium.outputs import RequestOutput


@dataclass(frozen=True, slots=True, eq=False)
class Echo:
    """The prompt with which choices begin."""

    text: str = ""
    logprobs: dict[str, Any] | None = None
    """In the form of completions; None where they were not asked for."""

    def before(self, text: str, logprobs: dict[str, Any] | None) -> tuple[str, dict[str, Any] | None]:
        """A choice that continues this prompt."""
        if self.logprobs is None or logprobs is None:
            return self.text + text, logprobs
        return self.text + text, {name: [*own, *logprobs[name]] for name, own in self.logprobs.items()}


NO_ECHO = Echo()


def make_echo(
    output: RequestOutput, detokenizer: Detokenizer | None, num_top: int | None, *, skip_special_tokens: bool
) -> Echo:
    """The echo of an output's prompt: its text, or the text of its token ids.

    Takes time that grows with the prompt.

    Args:
        output: with the prompt's log probabilities, if `num_top` isn't None.
        detokenizer: None where there is no tokenizer.
        num_top: alternatives to name for each token; None for no log probabilities.
        skip_special_tokens: leave special tokens out of the text of token ids.
    """
    token_ids = output.prompt_token_ids
    text, offsets, tokens = "", [0] * len(token_ids), [token_name(i, None, None) for i in token_ids]
    if detokenizer is not None:
        # Tokens that were added to a text, such as one for its beginning, are found by their place around it.
        skip_special_tokens &= output.prompt is None
        text, offsets = detokenizer.spell(token_ids, skip_special_tokens=skip_special_tokens)
        tokens = [token_name(i, detokenizer.token_text(i), detokenizer.token_bytes(i)) for i in token_ids]
    if output.prompt is not None:
        start = max(text.find(output.prompt), 0)
        text, offsets = output.prompt, [min(max(each - start, 0), len(output.prompt)) for each in offsets]
    if num_top is None:
        return Echo(text)
    return Echo(text, scored_tokens(token_ids, tokens, output.prompt_logprobs or [None], offsets, num_top))
