"""When a request's output ends, as far as token ids tell. The detokenizer finds stop strings."""

from __future__ import annotations

from dataclasses import dataclass

from sensorium.messages import FinishReason
from sensorium.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, eq=False)
class StopRule:
    """A request's stop conditions, ready to be asked once per sampled token."""

    eos_token_ids: frozenset[int]
    """Empty if the request ignores them."""
    stop_token_ids: frozenset[int]
    min_total_tokens: int
    """Below this many tokens of prompt and output, no token id ends the output."""
    max_total_tokens: int
    """At this many tokens of prompt and output, the output ends."""

    @classmethod
    def of(
        cls, params: SamplingParams, eos_token_ids: frozenset[int], num_prompt_tokens: int, max_model_len: int
    ) -> StopRule:
        """The rule of a request with a prompt of so many tokens."""
        max_total_tokens = max_model_len
        if params.max_tokens is not None:
            max_total_tokens = min(max_total_tokens, num_prompt_tokens + params.max_tokens)
        return cls(
            eos_token_ids=frozenset() if params.ignore_eos else frozenset(eos_token_ids),
            stop_token_ids=frozenset(params.stop_token_ids or ()),
            min_total_tokens=num_prompt_tokens + params.min_tokens,
            max_total_tokens=max_total_tokens,
        )

    def check(self, token_id: int, num_tokens: int) -> tuple[FinishReason, int | None] | None:
        """How the output ends with `token_id` as the last of `num_tokens` tokens; None if it goes on.

        The second value is the stop reason: the stop token's id, None for end of sequence and length.
        """
        if num_tokens >= self.min_total_tokens:
            if token_id in self.eos_token_ids:
                return FinishReason.STOP, None
            if token_id in self.stop_token_ids:
                return FinishReason.STOP, token_id
        if num_tokens >= self.max_total_tokens:
            return FinishReason.LENGTH, None
        return None
