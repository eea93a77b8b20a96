"""Known fields that are not implemented, and which of their values ask for nothing that isn't done anyway.

One table for all routes. A value that asks for nothing is accepted; one that doesn't change the answer's content is
ignored with a `Warning` header; any other is refused, naming the field. Null asks for nothing, for these fields and for
those that a route implements (`Body`). A field in neither place is unknown.

Source: OpenAI's API reference and the parameter types of its Python client, which a test walks; and the fields of vLLM
and SGLang that their clients send with values that change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from sensorium.entrypoints.openai.records import note_warning
from sensorium.errors import InvalidRequestError, UnsupportedFeatureError

_Test: TypeAlias = Callable[[Any], bool]

LOGPROBS = "message.output_text.logprobs"
INCLUDABLE = frozenset(
    {
        *("file_search_call.results", "web_search_call.results", "web_search_call.action.sources"),
        *("computer_call_output.output.image_url", "code_interpreter_call.outputs", "reasoning.encrypted_content"),
        "message.input_image.image_url",
    }
)
"""What `include` may name beside log probabilities. Pictures are always included; the rest doesn't exist here."""
_MAX_METADATA = 16
_MAX_KEY_CHARS = 64
_MAX_VALUE_CHARS = 512


@dataclass(frozen=True, slots=True)
class KnownField:
    """A field that isn't implemented.

    Args:
        expected: the values that are taken, for errors.
        takes: values that ask for nothing. passes: values that are ignored with a warning. note: what is not done for
        those.
    """

    expected: str
    takes: _Test
    passes: _Test = lambda _value: False
    note: str = ""

    def may_be_left_out(self, name: str, value: Any) -> bool:
        """Whether the value asks for nothing; the client is warned of an ignored one."""
        if value is None or self.takes(value):
            return True
        if self.passes(value):
            note_warning(f"{name} was ignored: {self.note}")
            return True
        return False


def known_field(name: str) -> KnownField | None:
    """The table's entry, if there is one. `name`: with the path to it, such as `text.verbosity`."""
    return _KNOWN.get(name)


def check_metadata(metadata: Mapping[str, str]) -> None:
    """Refuse metadata that exceed OpenAI's bounds. Raises `InvalidRequestError`."""
    if len(metadata) > _MAX_METADATA:
        raise InvalidRequestError(
            f"got {len(metadata)} entries, expected at most {_MAX_METADATA}. Remove some.", field="metadata"
        )
    for key, value in metadata.items():
        if len(key) > _MAX_KEY_CHARS or len(value) > _MAX_VALUE_CHARS:
            raise InvalidRequestError(
                f"got a key of {len(key)} and a value of {len(value)} characters, expected at most "
                f"{_MAX_KEY_CHARS} and {_MAX_VALUE_CHARS}. Shorten them.",
                field="metadata",
            )


def check_include(include: list[Any]) -> None:
    """Refuse unknown values. Raises `UnsupportedFeatureError`."""
    for each in include:
        if each != LOGPROBS and each not in INCLUDABLE:
            raise UnsupportedFeatureError(
                f"got {each!r:.80}, expected some of {sorted((LOGPROBS, *INCLUDABLE))}. Remove it.",
                field="include",
            )


# Tests of values


def _one_of(*values: Any) -> _Test:
    """Equal to one of them, and of its type: 1 is not true."""
    return lambda given: any(type(given) is type(value) and given == value for value in values)


def _is_number(expected: float) -> _Test:
    return lambda given: isinstance(given, int | float) and not isinstance(given, bool) and given == expected


def _is_empty(value: Any) -> bool:
    return isinstance(value, str | list | dict) and not value


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_nothing(_value: Any) -> bool:
    return False


def _is_metadata(value: Any) -> bool:
    if not isinstance(value, dict) or not all(each is None or isinstance(each, str) for each in value.values()):
        return False
    try:
        check_metadata({key: each or "" for key, each in value.items()})
    except InvalidRequestError:
        return False
    return True


def _is_includable(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) and each in INCLUDABLE for each in value)


# The table

_NULL = KnownField("null", _is_nothing)
_EMPTY = KnownField("null or nothing in it", _is_empty)
_OFF = KnownField("false", _one_of(False))
_ON = KnownField("true", _one_of(True))
_TEXT = KnownField("a string", _is_text)
_FLAG = KnownField("true or false", _is_flag)
_ONE = KnownField("1", _is_number(1))
_VERBOSITY = KnownField(
    "'low', 'medium' or 'high'",
    _one_of("medium"),
    _one_of("low", "high"),
    "say in the prompt how long answers should be",
)
_SUMMARY = KnownField(
    "'auto'",
    _one_of("auto"),
    _one_of("concise", "detailed"),
    "reasoning is given as it was written, and not summed up",
)

_OF_OPENAI: dict[str, KnownField] = {
    # For the caller's own records.
    "user": _TEXT,
    "safety_identifier": _TEXT,
    "metadata": KnownField(
        f"an object of at most {_MAX_METADATA} strings of at most {_MAX_VALUE_CHARS} characters", _is_metadata
    ),
    "store": KnownField("false", _one_of(False), _one_of(True), "only responses of /v1/responses are kept"),
    # How requests are served. Prefixes are cached without being asked to, as long as there is room.
    "prompt_cache_key": _TEXT,
    "prompt_cache_retention": KnownField("'in_memory' or '24h'", _one_of("in_memory", "in-memory", "24h")),
    "prompt_cache_options": KnownField("an object", _is_object),
    "service_tier": KnownField("'auto' or 'default'", _one_of("auto", "default")),
    "background": _OFF,
    "background_options": _EMPTY,
    "truncation": KnownField("'disabled'", _one_of("disabled")),
    "context_management": _EMPTY,
    "conversation": _NULL,
    "prompt": _NULL,
    "moderation": _NULL,
    "access_programs": _EMPTY,
    "personality": _NULL,
    # What a model is given or may do.
    "modalities": KnownField("['text']", _one_of(["text"], [])),
    "audio": _NULL,
    "image": KnownField(
        "context_compression 'auto' or 'disabled'",
        lambda value: value in ({}, {"context_compression": "auto"}, {"context_compression": "disabled"}),
    ),
    "web_search_options": _NULL,
    "tools": _EMPTY,
    "tool_choice": KnownField("'auto' or 'none'", _one_of("auto", "none")),
    "parallel_tool_calls": _FLAG,
    "max_tool_calls": KnownField(
        "a count, of which none is used: the server runs no tools", lambda value: type(value) is int and value >= 0
    ),
    "functions": _EMPTY,
    "function_call": KnownField("'auto' or 'none'", _one_of("auto", "none")),
    # What an answer is like.
    "prediction": KnownField("an object", _is_nothing, _is_object, "the answer is the same without it"),
    "verbosity": _VERBOSITY,
    "include": KnownField(f"some of {sorted(INCLUDABLE)}", _is_includable),
    "n": _ONE,
    "best_of": _ONE,
    "echo": _OFF,
    "suffix": _EMPTY,
    "logprobs": _OFF,
    "top_logprobs": KnownField("0", _is_number(0)),
    "logit_bias": _EMPTY,
    "stream": _OFF,
    "text.verbosity": _VERBOSITY,
    "reasoning.summary": _SUMMARY,
    "reasoning.generate_summary": _SUMMARY,
    "reasoning.context": KnownField("'auto'", _one_of("auto")),
    "reasoning.mode": KnownField("'standard'", _one_of("standard")),
    "tools.defer_loading": _OFF,
    "tools.async": _OFF,
    "tools.allowed_callers": KnownField("['direct']", _one_of([], ["direct"])),
    "tools.output_schema": KnownField("an object", _is_object),
    "tools.cache_control": KnownField("an object", _is_object),
    # Transcriptions.
    "chunking_strategy": _EMPTY,
    "keywords": _EMPTY,
    "languages": _EMPTY,
    "known_speaker_names": _EMPTY,
    "known_speaker_references": _EMPTY,
}

_OF_OTHER_SERVERS: dict[str, KnownField] = {
    "use_beam_search": _OFF,
    "length_penalty": _ONE,
    "early_stopping": _OFF,
    "typical_p": _ONE,
    "truncate_prompt_tokens": _NULL,
    "add_special_tokens": _FLAG,
    "allowed_token_ids": _EMPTY,
    "logits_processors": _EMPTY,
    "documents": _EMPTY,
    "guided_json_object": _OFF,
    "guided_decoding_backend": _TEXT,
    "guided_whitespace_pattern": _NULL,
    "structural_tag": _NULL,
    "return_token_ids": _OFF,
    "return_tokens_as_token_ids": _OFF,
    "kv_transfer_params": _EMPTY,
    "vllm_xargs": _EMPTY,
    "lora_path": _NULL,
    "separate_reasoning": _ON,
    "stream_reasoning": _ON,
    "no_stop_trim": _OFF,
    "cache_prompt": _ON,
}

_KNOWN = {**_OF_OTHER_SERVERS, **_OF_OPENAI}
