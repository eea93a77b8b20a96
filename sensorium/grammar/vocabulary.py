"""The index over a vocabulary that masks are computed with."""

from __future__ import annotations

import json
from typing import Any

from llguidance import LLTokenizer

from sensorium.messages import Vocabulary


def index_vocabulary(vocabulary: Vocabulary) -> LLTokenizer:
    """Takes about 7 us for each token.

    Raises:
        ValueError: Tokens don't stand for bytes in a way that is known here.
    """
    try:
        return LLTokenizer(
            _with_known_decoder(vocabulary.tokenizer_json),
            n_vocab=vocabulary.size,
            eos_token=list(vocabulary.eos_token_ids) or None,
        )
    except Exception as error:  # the library raises what it likes
        raise ValueError(
            "got some, but this model's tokenizer is none whose tokens stand for bytes "
            f"({type(error).__name__}), expected one of byte-level BPE or with byte fallback. Remove "
            "structured_outputs."
        ) from error


def _with_known_decoder(tokenizer_json: str) -> str:
    """The tokenizer with "Metaspace" spelt out, which the library takes for characters of their own."""
    if '"Metaspace"' not in tokenizer_json:
        return tokenizer_json
    tokenizer = json.loads(tokenizer_json)
    decoder = tokenizer.get("decoder") or {}
    decoders = decoder.get("decoders", [decoder])
    spelt = {"type": "Sequence", "decoders": [_spelt_out(each) for each in decoders]}
    return json.dumps({**tokenizer, "decoder": spelt})


def _spelt_out(decoder: dict[str, Any]) -> dict[str, Any]:
    if decoder.get("type") != "Metaspace":
        return decoder
    return {"type": "Replace", "pattern": {"String": decoder["replacement"]}, "content": " "}
