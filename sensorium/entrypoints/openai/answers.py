"""Parts of answers that both kinds of completions share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sensorium.engine.detokenizer import REPLACEMENT
from sensorium.outputs import CompletionOutput, PositionLogprobs, RequestOutput

_LEAST_LOGPROB = -9999.0
"""Stands for the logarithm of a probability of zero, since JSON has no infinity."""


class Usage:
    """Counts tokens over the outputs of one or several requests, deltas or whole."""

    def __init__(self) -> None:
        self._prompt: dict[int, tuple[int, int]] = {}
        self._num_output_tokens = 0

    def take(self, index: int, output: RequestOutput) -> None:
        """Count an output of request `index`."""
        self._prompt[index] = (len(output.prompt_token_ids), output.num_cached_tokens)
        self._num_output_tokens += sum(len(each.token_ids) for each in output.outputs)

    def body(self) -> dict[str, Any]:
        """The `usage` of an answer."""
        num_prompt_tokens = sum(count for count, _ in self._prompt.values())
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": self._num_output_tokens,
            "total_tokens": num_prompt_tokens + self._num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(cached for _, cached in self._prompt.values())},
        }


def chat_logprobs(output: CompletionOutput, num_top: int) -> dict[str, Any] | None:
    """`logprobs` of a chat choice; None where they were not asked for."""
    if output.logprobs is None:
        return None
    content = []
    for token_id, position in zip(output.token_ids, output.logprobs, strict=True):
        entry = _token_entry(position, token_id)
        entry["top_logprobs"] = [_token_entry(position, each) for each in top_ids(position, num_top)]
        content.append(entry)
    return {"content": content, "refusal": None}


def _token_entry(position: PositionLogprobs, token_id: int) -> dict[str, Any]:
    found = position[token_id]
    text, own = found.decoded_token, found.token_bytes
    token = f"token_id:{token_id}" if text is None else text
    if own is not None and _is_part(text, own):
        token = _escaped(own)
    return {
        "token": token,
        "logprob": _finite(found.logprob),
        "bytes": list(token.encode() if own is None else own),
    }


def token_name(token_id: int, text: str | None, own: bytes | None) -> str:
    """A token as OpenAI's completions write it: its text, or `bytes:\\xc3` where its own bytes are no whole characters.

    `token_id:5` without a tokenizer, and for an id without text.
    """
    if not text:
        return f"token_id:{token_id}"
    return text if own is None or not _is_part(text, own) else f"bytes:{_escaped(own)}"


def _is_part(text: str | None, own: bytes) -> bool:
    return text is not None and REPLACEMENT in text and text.encode() != own


def _escaped(own: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in own)


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)


def top_ids(position: PositionLogprobs, num_top: int) -> list[int]:
    """The most probable tokens of a position, best first."""
    ranked = sorted(position, key=lambda token_id: position[token_id].rank)
    return [token_id for token_id in ranked if position[token_id].rank <= num_top]


def completion_logprobs(output: CompletionOutput, num_top: int, text_offset: int) -> dict[str, Any] | None:
    """`logprobs` of a completion choice whose output begins at `text_offset`; None where they were not asked for."""
    if output.logprobs is None:
        return None
    tokens = [_name_at(position, i) for i, position in zip(output.token_ids, output.logprobs, strict=True)]
    offsets = output.text_offsets or [0] * len(tokens)
    return scored_tokens(output.token_ids, tokens, output.logprobs, [text_offset + each for each in offsets], num_top)


def scored_tokens(
    token_ids: Sequence[int],
    tokens: list[str],
    positions: Sequence[PositionLogprobs | None],
    text_offsets: list[int],
    num_top: int,
) -> dict[str, Any]:
    """Tokens with their log probabilities, in the form of completions.

    Args:
        token_ids: the tokens.
        tokens: their names.
        positions: what is known of each; None where nothing comes before it.
        text_offsets: where in the choice's text each begins.
        num_top: alternatives to name; the token itself is always among them.
    """
    each = list(zip(token_ids, positions, strict=True))
    return {
        "tokens": tokens,
        "token_logprobs": [None if position is None else _finite(position[i].logprob) for i, position in each],
        "top_logprobs": [None if position is None else _alternatives(position, i, num_top) for i, position in each],
        "text_offset": text_offsets,
    }


def _alternatives(position: PositionLogprobs, token_id: int, num_top: int) -> dict[str, float]:
    """The best first. Of two tokens with the same text, only the better one is listed."""
    found: dict[str, float] = {}
    for each in (*top_ids(position, num_top), token_id):
        found.setdefault(_name_at(position, each), _finite(position[each].logprob))
    return found


def _name_at(position: PositionLogprobs, token_id: int) -> str:
    return token_name(token_id, position[token_id].decoded_token, position[token_id].token_bytes)


def prompt_logprobs(positions: Sequence[PositionLogprobs | None] | None) -> list[dict[str, Any] | None] | None:
    """Log probabilities of a prompt's tokens in vLLM's form: by token id, for each position but the first."""
    if positions is None:
        return None
    return [
        None
        if position is None
        else {
            str(token_id): {"logprob": _finite(e.logprob), "rank": e.rank, "decoded_token": e.decoded_token}
            for token_id, e in position.items()
        }
        for position in positions
    ]
