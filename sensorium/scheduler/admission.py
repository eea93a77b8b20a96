"""Refuses what could never be served, before it is queued.

The front checks requests against the model; here is checked what depends on the memory that the engine found, and what
would break the scheduler's own books if the front had missed it.
"""

from __future__ import annotations

from collections.abc import Sequence

from sensorium.cache_spec import CacheGroup
from sensorium.errors import ContextLengthError, InvalidRequestError
from sensorium.messages import EngineRequest


def check_request(
    request: EngineRequest, *, max_model_len: int, groups: Sequence[CacheGroup], least_chunk_tokens: int
) -> None:
    """Raise `InvalidRequestError` unless the request can run to its end when it is alone.

    Args:
        request: Any.
        max_model_len: Most tokens of prompt and output.
        groups: What the caches have room for.
        least_chunk_tokens: Tokens of the request that must be computed in one step, because they can't be parted.
    """
    num_prompt_tokens = len(request.prompt_token_ids)
    if num_prompt_tokens == 0:
        raise InvalidRequestError("got 0 tokens, expected at least 1. Send a prompt that is not empty.", field="prompt")
    max_prompt_tokens = max_model_len if request.pooling else max_model_len - 1
    if num_prompt_tokens > max_prompt_tokens:
        raise ContextLengthError.of_prompt(str(num_prompt_tokens), max_prompt_tokens, max_model_len)
    _check_media(request, num_prompt_tokens)
    max_tokens = request.sampling_params.max_tokens
    longest = max_model_len if max_tokens is None else min(num_prompt_tokens + max_tokens, max_model_len)
    # The last token is never computed: nothing follows it.
    num_computed = num_prompt_tokens if request.pooling else longest - 1
    for group in groups:
        held = group.max_tokens(least_chunk_tokens)
        if held is not None and num_computed > held:
            raise ContextLengthError(
                f"request too long for the KV cache: got up to {num_computed} tokens of prompt and output, expected at "
                f"most {held} (num_blocks {group.num_blocks} of {group.block_size} tokens). Lower max_tokens or "
                "max_model_len, or raise num_blocks or kv_cache_bytes."
            )


def _check_media(request: EngineRequest, num_prompt_tokens: int) -> None:
    end = 0
    for item in request.media:
        span = item.span
        if span.offset < end or span.length < 1 or span.end > num_prompt_tokens:
            raise InvalidRequestError(
                f"{item.modality} item {item.index}: got the span [{span.offset}, {span.end}), expected one within "
                f"[{end}, {num_prompt_tokens}), behind the item before it. Check the placeholders in the prompt."
            )
        if not span.has_valid_rows:
            raise InvalidRequestError(
                f"{item.modality} item {item.index}: got row offsets that don't ascend within the span, expected "
                f"ascending ones from 0 to {span.length - 1}. Check the placeholders in the prompt."
            )
        end = span.end
