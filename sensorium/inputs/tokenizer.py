"""Text to token ids: the checkpoint's tokenizer, loaded once, and encoding that any thread may call.

Ids back to text is the detokenizer's job. Transformers is imported when a tokenizer is loaded.
"""

from __future__ import annotations

import threading
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

    @cached_property
    def max_token_id(self) -> int:
        """The largest id in the vocabulary, added tokens included."""
        return max(self.tokenizer.get_vocab().values(), default=-1)

    @cached_property
    def max_token_chars(self) -> int:
        """Characters of the longest token: no token stands for more."""
        return max(map(len, self.tokenizer.get_vocab()), default=1)
