"""Parts of answers that both kinds of completions share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sensorium.outputs import CompletionOutput, PositionLogprobs, RequestOutput


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
    token = token_text(position, token_id)
    return {"token": token, "logprob": found.logprob, "bytes": list(token.encode())}


def token_text(position: PositionLogprobs, token_id: int) -> str:
    """A token as text; `token_id:5` without a tokenizer."""
    text = position[token_id].decoded_token
    return f"token_id:{token_id}" if text is None else text


def top_ids(position: PositionLogprobs, num_top: int) -> list[int]:
    """The most probable tokens of a position, best first."""
    ranked = sorted(position, key=lambda token_id: position[token_id].rank)
    return [token_id for token_id in ranked if position[token_id].rank <= num_top]


def completion_logprobs(output: CompletionOutput, num_top: int, text_offset: int) -> dict[str, Any] | None:
    """`logprobs` of a completion choice that begins at `text_offset`; None where they were not asked for."""
    if output.logprobs is None:
        return None
    tokens = [token_text(position, i) for i, position in zip(output.token_ids, output.logprobs, strict=True)]
    return {
        "tokens": tokens,
        "token_logprobs": [p[i].logprob for i, p in zip(output.token_ids, output.logprobs, strict=True)],
        "top_logprobs": [
            {token_text(position, each): position[each].logprob for each in top_ids(position, num_top)}
            for position in output.logprobs
        ],
        "text_offset": list(_offsets(tokens, text_offset)),
    }


def _offsets(tokens: Iterable[str], start: int) -> Iterable[int]:
    for token in tokens:
        yield start
        start += len(token)
