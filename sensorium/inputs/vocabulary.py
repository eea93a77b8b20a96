"""What the front tells the engine core about its tokenizer, once, when the first output is to be held to a grammar."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sensorium.errors import UnsupportedFeatureError
from sensorium.messages import Vocabulary


def vocabulary_of(tokenizer: Any, eos_token_ids: Iterable[int], vocab_size: int) -> Vocabulary:
    """The vocabulary of a Hugging Face tokenizer beside a model with `vocab_size` logits.

    Raises:
        UnsupportedFeatureError: There is no tokenizer, or it has no Rust backend.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        got = "no tokenizer" if tokenizer is None else f"a {type(tokenizer).__name__}"
        raise UnsupportedFeatureError(
            f"got some, but the engine has {got}, expected a tokenizer of the tokenizers "
            "library. Remove structured_outputs, or load the model with its fast tokenizer.",
            field="structured_outputs",
        )
    eos = set(eos_token_ids) or {id for id in [tokenizer.eos_token_id] if id is not None}
    size = max(vocab_size, 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1))
    return Vocabulary(backend.to_str(), tuple(sorted(id for id in eos if 0 <= id < size)), size)
