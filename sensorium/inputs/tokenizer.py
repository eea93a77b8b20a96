"""Text to token ids: the checkpoint's tokenizer, loaded once, and encoding that any thread may call.

Ids back to text is the detokenizer's job. Transformers is imported when a tokenizer is loaded.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sensorium.errors import ConfigError, ContextLengthError

if TYPE_CHECKING:
    from sensorium.config import ModelConfig


def get_tokenizer(model_config: ModelConfig) -> Any:
    """The Hugging Face tokenizer of a model, as `AutoTokenizer` makes it.

    A new object on every call, for the front process to keep: input processors that pad or truncate work on
    one of their own, so that no thread finds another's settings.

    Raises `ConfigError` (a `ValueError`) if there is none that can be loaded.
    """
    from transformers import AutoTokenizer

    is_own = model_config.tokenizer == model_config.model
    try:
        return AutoTokenizer.from_pretrained(
            model_config.tokenizer,
            # With the config at hand, its file needn't be read again; another directory's may differ.
            config=model_config.hf_config if is_own else None,
            trust_remote_code=model_config.trust_remote_code,
            revision=model_config.revision if is_own else None,
        )
    except Exception as exc:  # the tokenizers' library raises plain Exceptions on malformed files
        reason = " ".join(str(exc).split())
        raise ConfigError(
            f"tokenizer: got {model_config.tokenizer!r}, expected a directory with a tokenizer that transformers can "
            f"load ({type(exc).__name__}: {reason:.200}). Set tokenizer, or skip_tokenizer_init to take token ids only."
        ) from exc


_MAX_TRUNCATED_CHARS = 1 << 20
"""So many characters of a text that may be truncated are looked at in any case."""


@dataclass(frozen=True, slots=True)
class EncodedText:
    """Token ids, and for each which text of a pair it belongs to: 0 or 1."""

    ids: list[int]
    type_ids: list[int]


class TextEncoder:
    """Encodes prompts with a Hugging Face tokenizer; safe to call from several threads."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is not None:
            # A tokenizer's file may ask for padding and truncation; transformers sets both aside on every call.
            self._backend.no_padding()
            self._backend.no_truncation()
        self._lock = threading.Lock()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, equal to those of the Hugging Face tokenizer."""
        if self._backend is not None:
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
            return ids
        with self._lock:  # tokenizers written in Python promise nothing about threads
            return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def encode_bounded(self, text: str, max_tokens: int, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text that has at most `max_tokens`; a text that can't is refused before it is
        encoded.

        Raises `InvalidRequestError` (a `ValueError`).
        """
        if len(text) > 8 * max_tokens:  # shorter texts are encoded quickly enough to count
            least = -(-len(text) // self.max_token_chars)
            if least > max_tokens:
                raise ContextLengthError.of_prompt(f"at least {least}", max_tokens, max_tokens)
        ids = self.encode(text, add_special_tokens=add_special_tokens)
        if len(ids) > max_tokens:
            raise ContextLengthError.of_prompt(str(len(ids)), max_tokens, max_tokens)
        return ids

    def encode_pair(
        self, text: str, pair: str | None, max_tokens: int, *, truncates: bool, add_special_tokens: bool = True
    ) -> EncodedText:
        """A text, or two as one sequence, of at most `max_tokens` tokens.

        `truncates`: leave out tokens at the texts' ends where there are more, those of the longer text first, as
        transformers' `longest_first`; else that is an error.

        Raises `InvalidRequestError` (a `ValueError`).
        """
        most_chars = max_tokens * self.max_token_chars
        texts = [each for each in (text, pair) if each is not None]
        if not truncates and sum(map(len, texts)) > max(most_chars, 8 * max_tokens):
            least = -(-sum(map(len, texts)) // self.max_token_chars)
            raise ContextLengthError.of_prompt(f"at least {least}", max_tokens, max_tokens)
        if truncates and self.tokenizer.truncation_side == "right":
            # Whatever a normalizer drops, the tokens that count come of these; the rest would only take time.
            texts = [each[: max(16 * most_chars, _MAX_TRUNCATED_CHARS)] for each in texts]
        encoded = self._encode_texts(texts, max_tokens, truncates=truncates, add_special_tokens=add_special_tokens)
        if len(encoded.ids) > max_tokens:
            if truncates:
                raise ContextLengthError.of_prompt(
                    f"{len(encoded.ids)} (special ones alone)", max_tokens, max_tokens, "Raise truncate_prompt_tokens"
                )
            raise ContextLengthError.of_prompt(str(len(encoded.ids)), max_tokens, max_tokens)
        return encoded

    def _encode_texts(
        self, texts: list[str], max_tokens: int, *, truncates: bool, add_special_tokens: bool
    ) -> EncodedText:
        if self._backend is None:
            with self._lock:
                found = self.tokenizer(
                    *texts,
                    add_special_tokens=add_special_tokens,
                    truncation="longest_first" if truncates else False,
                    max_length=max_tokens if truncates else None,
                    return_token_type_ids=True,
                )
                return EncodedText(list(found["input_ids"]), list(found["token_type_ids"]))
        parts = [self._backend.encode(each, add_special_tokens=False) for each in texts]
        if truncates:
            num_special = self._backend.num_special_tokens_to_add(len(texts) == 2) if add_special_tokens else 0
            lengths = _longest_first([len(part.ids) for part in parts], max(max_tokens - num_special, 0))
            for part, length in zip(parts, lengths, strict=True):
                part.truncate(length, direction=self.tokenizer.truncation_side)
        whole = self._backend.post_process(*parts, *[None] * (2 - len(parts)), add_special_tokens)
        return EncodedText(whole.ids, whole.type_ids)

    @cached_property
    def max_token_id(self) -> int:
        """The largest id in the vocabulary, added tokens included."""
        return max(self.tokenizer.get_vocab().values(), default=-1)

    @cached_property
    def max_token_chars(self) -> int:
        """Characters of the longest token: no token stands for more."""
        return max(map(len, self.tokenizer.get_vocab()), default=1)


def _longest_first(lengths: list[int], room: int) -> list[int]:
    """Lengths with a sum of at most `room`, cut from the longer one until both are alike, then from both.

    For example, [7, 3] for a room of 5 is [3, 2], and [5, 5] is [2, 3].
    """
    if sum(lengths) <= room:
        return lengths
    if len(lengths) == 1:
        return [room]
    first, second = lengths
    short = min(first, second)
    if room >= 2 * short:
        return [room - short, short] if first > second else [short, room - short]
    half = room // 2
    return [room - half, half] if first > second else [half, room - half]
