"""Prompt forms: what callers write, checked and brought into one shape.

A prompt is a string, a list of token ids, or a dict (`TextPrompt`, `TokensPrompt`). Nothing is computed here,
so that a malformed prompt costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sensorium.errors import InvalidRequestError, InvalidTypeError
from sensorium.inputs.data import is_explicit_encoder_decoder_prompt

_KEYS = frozenset(
    {
        "prompt",
        "prompt_token_ids",
        "token_type_ids",
        "text_pair",
        "multi_modal_data",
        "multi_modal_uuids",
        "mm_processor_kwargs",
        "add_special_tokens",
        "type",
    }
)


@dataclass(frozen=True, slots=True)
class ParsedPrompt:
    """A prompt of known shape. Either `token_ids` or `text` is there; with both, the ids count."""

    text: str | None = None
    token_ids: list[int] | None = None
    token_type_ids: list[int] | None = None
    text_pair: str | None = None
    """A second text, which is encoded with the first as the tokenizer encodes pairs."""
    add_special_tokens: bool = True
    """Whether encoding adds the tokenizer's own special tokens; a rendered chat has its own."""
    multi_modal_data: Mapping[str, Any] = field(default_factory=dict)
    """By modality, as given."""
    multi_modal_uuids: Mapping[str, Any] = field(default_factory=dict)
    """By modality, a name or None for each item, as given."""
    mm_processor_kwargs: Mapping[str, Any] = field(default_factory=dict)


def parse_prompt(prompt: object, *, takes_halves: bool = False) -> ParsedPrompt:
    """Bring a prompt of any accepted form into one shape. `takes_halves`: the model has an encoder and a decoder.

    Raises:
        InvalidTypeError: (a `TypeError`) The prompt, or a part of it, has another type.
        InvalidRequestError: (a `ValueError`) It has encoder and decoder halves, which the model doesn't take, or text
            in the encoder's, which no model here takes.
    """
    if isinstance(prompt, str):
        return ParsedPrompt(text=prompt)
    if isinstance(prompt, list | tuple | np.ndarray):
        return ParsedPrompt(token_ids=_token_ids("prompt", prompt))
    if not isinstance(prompt, Mapping):
        raise _wrong_type("prompt", prompt, "a string, a list of token ids or a dict")
    if is_explicit_encoder_decoder_prompt(prompt) or "decoder_prompt" in prompt:
        if not takes_halves:
            raise InvalidRequestError(
                "got encoder and decoder prompts for a decoder-only model, expected one prompt. "
                "Cannot pass encoder-decoder prompt to decoder-only models: send prompt or prompt_token_ids.",
                field="prompt",
            )
        return _joined_halves(prompt)
    return _parse_dict(prompt)


def _joined_halves(prompt: Mapping[str, Any]) -> ParsedPrompt:
    """One prompt of `encoder_prompt`, which brings the media, and `decoder_prompt`."""
    unknown = sorted(
        str(key) for key in prompt if key not in ("encoder_prompt", "decoder_prompt", "mm_processor_kwargs")
    )
    if unknown:
        raise InvalidTypeError(
            f"got the keys {unknown[:8]} beside encoder and decoder prompts, expected none. Move them into one.",
            field="prompt",
        )
    encoder, decoder = (
        parse_prompt(each or "") for each in (prompt.get("encoder_prompt"), prompt.get("decoder_prompt"))
    )
    if encoder.text or encoder.token_ids or decoder.multi_modal_data:
        raise InvalidRequestError(
            "got text beside the media, or media in decoder_prompt, expected an encoder's half of media and a "
            "decoder's of text. Send prompt and multi_modal_data instead.",
            field="encoder_prompt",
        )
    return replace(
        decoder,
        multi_modal_data=encoder.multi_modal_data,
        multi_modal_uuids=encoder.multi_modal_uuids,
        mm_processor_kwargs={
            **encoder.mm_processor_kwargs,
            **decoder.mm_processor_kwargs,
            **_names("mm_processor_kwargs", prompt.get("mm_processor_kwargs")),
        },
    )


def _parse_dict(prompt: Mapping[str, Any]) -> ParsedPrompt:
    unknown = sorted(str(key) for key in prompt if key not in _KEYS)
    if unknown:
        raise InvalidTypeError(
            f"got the unknown keys {unknown[:8]}, expected keys of TextPrompt or TokensPrompt. Remove them.",
            field="prompt",
        )
    text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if text is None and ids is None:
        raise InvalidTypeError(
            f"got a dict with {sorted(prompt)}, expected 'prompt' or 'prompt_token_ids' in it. Add one.", field="prompt"
        )
    if text is not None and not isinstance(text, str):
        raise _wrong_type("prompt", text, "a string")
    pair = prompt.get("text_pair")
    if pair is not None and (not isinstance(pair, str) or text is None):
        raise _wrong_type("text_pair", pair, "a string beside the string 'prompt'")
    add_special_tokens = prompt.get("add_special_tokens", True)
    if not isinstance(add_special_tokens, bool):
        raise _wrong_type("add_special_tokens", add_special_tokens, "true or false")
    type_ids = prompt.get("token_type_ids")
    return ParsedPrompt(
        text=text,
        token_ids=None if ids is None else _token_ids("prompt_token_ids", ids),
        token_type_ids=None if type_ids is None else _token_ids("token_type_ids", type_ids),
        text_pair=pair,
        add_special_tokens=add_special_tokens,
        multi_modal_data=_names("multi_modal_data", prompt.get("multi_modal_data")),
        multi_modal_uuids=_names("multi_modal_uuids", prompt.get("multi_modal_uuids")),
        mm_processor_kwargs=_names("mm_processor_kwargs", prompt.get("mm_processor_kwargs")),
    )


def _token_ids(name: str, value: object) -> list[int]:
    """Ids as a list of Python ints, from any sequence or array of integers."""
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str | bytes):
        if not hasattr(value, "tolist"):
            raise _wrong_type(name, value, "a list of token ids")
        value = value.tolist()  # a tensor
    try:
        ids = np.asarray(value)
    except (ValueError, OverflowError):  # ragged, or beyond any integer type
        raise _wrong_members(name) from None
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise _wrong_members(name)
    members: list[int] = ids.tolist()
    return members


def _names(name: str, value: object) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise _wrong_type(name, value, "a dict with names for keys")
    return value


def _wrong_type(name: str, value: object, expected: str) -> InvalidTypeError:
    return InvalidTypeError(
        f"got a value of type {type(value).__name__}, expected {expected}. Change {name}.", field=name
    )


def _wrong_members(name: str) -> InvalidTypeError:
    return InvalidTypeError(
        f"got something other than integers, expected a list of token ids. Change {name}.", field=name
    )
