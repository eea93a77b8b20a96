"""How one request's tokens are chosen and when its output ends.

`SamplingParams` is complete and checked at construction: no further checks are needed, except those that depend on the
model (`check_against`). Free of torch; read by the front, the scheduler and the worker.
"""

from __future__ import annotations

import math
import operator
import re
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from sensorium.errors import InvalidRequestError, InvalidTypeError
from sensorium.structured_outputs import StructuredOutputs
from sensorium.timestamps import TimestampRules

MAX_N = 128
"""Most outputs for one prompt: each occupies a slot and its own KV blocks."""
MAX_LOGPROBS = 128
"""Most alternatives reported per position: a reply's size is this times the number of tokens."""
MAX_STOP_STRINGS = 64
MAX_STOP_STRING_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_VISIBLE_SPECIAL_TOKEN_IDS = 64
MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARS = 256
MAX_BAD_WORD_SEQUENCES = 4 * MAX_BAD_WORDS
"""A bad word stands for several token sequences: with and without a space in front."""
MAX_LOGIT_BIASES = 1024
MAX_LOGIT_BIAS = 100.0
"""Large enough to force or forbid a token, small enough to leave logits finite."""
GREEDY_TEMPERATURE = 1e-5
"""Below this a temperature means greedy: dividing by it would only magnify rounding errors."""

WHOLE_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")
"""A number from 0 on as JSON writes it. `int` takes several texts for one number, and digits of all scripts."""

MIX_INCREMENT, MIX_FACTOR_1, MIX_FACTOR_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""Constants of SplitMix64, see `mix64`."""

_MAX_COUNT = 2**31 - 1
_MIN_SEED, _MAX_SEED = -(2**63), 2**63 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling and stopping rules of one request; every value is finite and within the bounds given here.

    Collections may be given as lists, or as None for an empty one; they are kept as tuples and a dict.

    Raises:
        InvalidRequestError: a value is out of bounds.
        InvalidTypeError: a value has the wrong type.
    """

    n: int = 1
    """Outputs for the prompt, 1 to `MAX_N`."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token that the output contains, -2 to 2."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time that the output contains it, -2 to 2."""
    repetition_penalty: float = 1.0
    """Logits of tokens in prompt or output are divided by this if positive, else multiplied; 0.01 to 100."""
    temperature: float = 1.0
    """Logits are divided by this; 0 to 100, where less than `GREEDY_TEMPERATURE` means greedy."""
    top_p: float = 1.0
    """Smallest set of best tokens whose probability reaches this, above 0 to 1."""
    top_k: int = 0
    """Number of best tokens that stay; 0 or -1: all."""
    min_p: float = 0.0
    """Least probability of a token that stays, relative to the best token's, 0 to 1."""
    seed: int | None = None
    """Makes the tokens depend on this and the prompt alone; a signed 64-bit integer."""
    stop: Sequence[str] = ()
    """Strings that end the output where they first appear in its text; one string or several."""
    stop_token_ids: Sequence[int] = ()
    """Token ids that end the output."""
    ignore_eos: bool = False
    """Go on past the model's end-of-sequence tokens."""
    max_tokens: int | None = 16
    """Most tokens of the output; None: as many as the model's context holds."""
    min_tokens: int = 0
    """Until there are so many tokens, no end-of-sequence or stop token and no stop string ends the output."""
    logprobs: int | None = None
    """Report each output token's log probability and those of this many best tokens; None: no report."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens, from the second on."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids, -100 to 100."""
    bad_words: Sequence[str] = ()
    """Words that must not be generated; they take effect through the ids that `with_bad_word_ids` adds."""
    bad_words_token_ids: Sequence[Sequence[int]] = ()
    """Token sequences that must not be completed."""
    begin_suppress_tokens: Sequence[int] = ()
    """Token ids that must not be generated first."""
    allowed_token_ids: Sequence[int] = ()
    """The only token ids that may be generated; empty: all."""
    timestamps: TimestampRules | None = None
    """How tokens that tell times stand in the output, of a model that has them."""
    structured_outputs: StructuredOutputs | None = None
    """What the output is held to: JSON, a schema, a grammar and the like."""
    detokenize: bool = True
    """Turn the output into text. Without it, no stop strings."""
    skip_special_tokens: bool = True
    visible_special_token_ids: Sequence[int] = ()
    """Special tokens that stay in the text nevertheless, such as those that set calls apart."""
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    """Keep the stop string, or the text of the stop token, at the end of the output's text."""

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"got {self.min_tokens}, expected at most max_tokens ({self.max_tokens}). "
                "Lower min_tokens or raise max_tokens.",
                field="min_tokens",
            )
        if self.stop and not self.detokenize:
            raise InvalidRequestError(
                "got stop strings with detokenize=False, expected text to search. "
                "Set detokenize=True or use stop_token_ids.",
                field="stop",
            )

    @classmethod
    def from_optional(cls, **values: Any) -> SamplingParams:
        """Build from values of which each may be None for "not given": what a request body holds.

        `max_tokens=None` too means "not given" here; leave it to the caller to say what that stands for.
        """
        unknown = values.keys() - {f.name for f in fields(cls)}
        if unknown:
            raise InvalidTypeError(
                f"sampling parameters: got {_list_of(sorted(unknown))}, expected fields of SamplingParams. "
                "Remove or rename them."
            )
        return cls(**{name: value for name, value in values.items() if value is not None})

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken without chance."""
        return self.temperature < GREEDY_TEMPERATURE or self.top_k == 1

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on which tokens occurred before."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def needs_sampled_tokens(self) -> bool:
        """Whether the host must have seen every token before the next one can be sampled, apart from penalties."""
        follows_tokens = bool(self.bad_words_token_ids) or self.timestamps is not None
        return follows_tokens or self.structured_outputs is not None

    def end_token_ids(self, eos_token_ids: Iterable[int]) -> frozenset[int]:
        """All token ids that end the output of a model with these end-of-sequence ids."""
        return frozenset(self.stop_token_ids) | (frozenset() if self.ignore_eos else frozenset(eos_token_ids))

    def for_output(self, index: int) -> SamplingParams:
        """Parameters of one of the `n` outputs as a request of its own.

        Output 0 keeps the seed, so that it equals the output of the same request with `n=1`; the others get
        seeds that follow from it. The prompt's log probabilities are output 0's to report.
        """
        if not 0 <= index < self.n:
            raise IndexError(f"output index: got {index}, expected 0 to {self.n - 1}.")
        if index == 0:
            return replace(self, n=1) if self.n > 1 else self
        seed = None if self.seed is None else mix64(mix64(self.seed) + index)
        return replace(self, n=1, seed=seed, prompt_logprobs=None)

    def with_bad_word_ids(self, encode: Callable[[str], Sequence[int]]) -> SamplingParams:
        """The same parameters with the token sequences of `bad_words` added.

        `encode` gives a text's token ids without special tokens. Each word is encoded as it starts a text and
        as it follows a space, the two forms in which it appears in running text.
        """
        if not self.bad_words:
            return self
        sequences = dict.fromkeys(tuple(ids) for ids in self.bad_words_token_ids)
        for word in self.bad_words:
            stripped = word.lstrip(" ")
            for form in (stripped, " " + stripped) if stripped else (word,):
                sequences.update(dict.fromkeys([tuple(encode(form))]))
        sequences.pop((), None)
        return replace(self, bad_words_token_ids=tuple(sequences))

    def check_against(self, *, vocab_size: int, max_model_len: int, num_prompt_tokens: int = 0) -> None:
        """Check what depends on the model. Raises `InvalidRequestError`."""
        _check_ids("stop_token_ids", self.stop_token_ids, vocab_size)
        _check_ids("logit_bias", self.logit_bias, vocab_size)
        _check_ids("begin_suppress_tokens", self.begin_suppress_tokens, vocab_size)
        _check_ids("allowed_token_ids", self.allowed_token_ids, vocab_size)
        for sequence in self.bad_words_token_ids:
            _check_ids("bad_words_token_ids", sequence, vocab_size)
        room = max_model_len - num_prompt_tokens
        if self.min_tokens > room:
            raise InvalidRequestError(
                f"got {self.min_tokens}, expected at most the {room} tokens left in the context. "
                "Lower min_tokens, shorten the prompt or raise max_model_len.",
                field="min_tokens",
            )


def mix64(value: int) -> int:
    """A signed 64-bit integer of which every bit depends on every bit of `value` modulo 2^64.

    Source: the output function of SplitMix64, in Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators", 2014.
    """
    mask = 2**64 - 1
    z = (value + MIX_INCREMENT) & mask
    z = ((z ^ (z >> 30)) * MIX_FACTOR_1) & mask
    z = ((z ^ (z >> 27)) * MIX_FACTOR_2) & mask
    z ^= z >> 31
    return z - 2**64 if z > _MAX_SEED else z


def _check_ids(name: str, token_ids: Collection[int], vocab_size: int) -> None:
    if token_ids and max(token_ids) >= vocab_size:
        raise InvalidRequestError(
            f"got token id {max(token_ids)}, expected less than the vocabulary's {vocab_size}. Remove it from {name}.",
            field=name,
        )


# Checks of single values: each takes the field's name and the value given, and returns the value to keep.

_Check = Callable[[str, Any], Any]


def _shown(value: object) -> str:
    """The value for a message: short, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    return reprlib.repr(value)


def _list_of(names: Sequence[str]) -> str:
    return ", ".join(_shown(name) for name in names[:8])


def _out_of_bounds(name: str, value: object, expected: str) -> InvalidRequestError:
    text = f"got {_shown(value)}, expected {expected}. Change {name}."
    return InvalidRequestError(text, field=name, reason=f"expected {expected}")


def _wrong_type(name: str, value: object, expected: str) -> InvalidTypeError:
    text = f"got a value of type {type(value).__name__}, expected {expected}. Change {name}."
    return InvalidTypeError(text, field=name, reason=f"expected {expected}")


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong_type(name, value, "true or false")
    return value


def _as_int(name: str, value: Any) -> int:
    if isinstance(value, bool):
        raise _wrong_type(name, value, "an integer")
    try:
        return operator.index(value)
    except TypeError:
        raise _wrong_type(name, value, "an integer") from None


def _integer(low: int, high: int) -> _Check:
    def check(name: str, value: Any) -> int:
        number = _as_int(name, value)
        if not low <= number <= high:
            bound = f"at least {low}" if high == _MAX_COUNT else f"an integer from {low} to {high}"
            raise _out_of_bounds(name, number, bound)
        return number

    return check


def _optional(inner: _Check) -> _Check:
    return lambda name, value: None if value is None else inner(name, value)


def _as_float(name: str, value: Any) -> float:
    if isinstance(value, bool | str | bytes):
        raise _wrong_type(name, value, "a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError):
        raise _wrong_type(name, value, "a number") from None
    return number


def _number(low: float, high: float, *, above: bool = False) -> _Check:
    """A finite number of `[low, high]`, or of `(low, high]` if `above`."""

    def check(name: str, value: Any) -> float:
        number = _as_float(name, value)
        if not (low < number if above else low <= number) or not number <= high:  # NaN fails both ways
            bound = f"more than {low:g}, at most {high:g}" if above else f"a number from {low:g} to {high:g}"
            raise _out_of_bounds(name, value, bound)
        return number

    return check


def _items(name: str, value: Any, max_items: int, kind: str) -> Sequence[Any]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise _wrong_type(name, value, f"a list of {kind}")
    items: Sequence[Any] = value if isinstance(value, Sequence) else tuple(value)
    if len(items) > max_items:
        raise InvalidRequestError(
            f"got {len(items)} entries, expected at most {max_items}. Shorten {name}.", field=name
        )
    return items


def _strings(max_items: int, max_chars: int) -> _Check:
    def check(name: str, value: Any) -> tuple[str, ...]:
        if value is None:
            return ()
        items = (value,) if isinstance(value, str) else _items(name, value, max_items, "strings")
        for item in items:
            if not isinstance(item, str):
                raise _wrong_type(name, item, "strings")
            if not 0 < len(item) <= max_chars:
                raise InvalidRequestError(
                    f"got a string of {len(item)} characters, expected 1 to {max_chars}. Change {name}.", field=name
                )
        return tuple(items)

    return check


def _token_ids(max_items: int) -> _Check:
    one = _integer(0, _MAX_COUNT)

    def check(name: str, value: Any) -> tuple[int, ...]:
        if value is None:
            return ()
        return tuple(one(name, item) for item in _items(name, value, max_items, "token ids"))

    return check


def _token_sequences(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    if value is None:
        return ()
    one = _token_ids(4 * MAX_BAD_WORD_CHARS)
    sequences = tuple(one(name, item) for item in _items(name, value, MAX_BAD_WORD_SEQUENCES, "lists of token ids"))
    if not all(sequences):
        raise InvalidRequestError("got an empty list, expected at least one token id. Remove it.", field=name)
    return sequences


def _biases(name: str, value: Any) -> dict[int, float]:
    """Keys may be decimal strings, since JSON has no other keys."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _wrong_type(name, value, "a mapping from token ids to numbers")
    if len(value) > MAX_LOGIT_BIASES:
        raise InvalidRequestError(
            f"got {len(value)} entries, expected at most {MAX_LOGIT_BIASES}. Shorten {name}.", field=name
        )
    token_id = _integer(0, _MAX_COUNT)
    bias = _number(-MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
    biases = {token_id(name, _key_as_int(name, key)): bias(name, number) for key, number in value.items()}
    if len(biases) < len(value):
        raise InvalidRequestError("got a token id twice, expected it once. Remove one of them.", field=name)
    return biases


def _timestamps(name: str, value: Any) -> TimestampRules | None:
    if value is not None and not isinstance(value, TimestampRules):
        raise _wrong_type(name, value, "TimestampRules")
    return value


def _structured_outputs(name: str, value: Any) -> StructuredOutputs | None:
    if value is not None and not isinstance(value, StructuredOutputs):
        raise _wrong_type(name, value, "StructuredOutputs")
    return value


def _key_as_int(name: str, key: Any) -> Any:
    if not isinstance(key, str):
        return key
    if WHOLE_NUMBER.fullmatch(key) is None:
        raise InvalidRequestError(
            f"got the key {_shown(key)}, expected a token id in digits, such as '42'. Change it.", field=name
        )
    return int(key)


_CHECKS: dict[str, _Check] = {
    "n": _integer(1, MAX_N),
    "presence_penalty": _number(-2.0, 2.0),
    "frequency_penalty": _number(-2.0, 2.0),
    "repetition_penalty": _number(0.01, 100.0),
    "temperature": _number(0.0, 100.0),
    "top_p": _number(0.0, 1.0, above=True),
    "top_k": _integer(-1, _MAX_COUNT),
    "min_p": _number(0.0, 1.0),
    "seed": _optional(_integer(_MIN_SEED, _MAX_SEED)),
    "stop": _strings(MAX_STOP_STRINGS, MAX_STOP_STRING_CHARS),
    "stop_token_ids": _token_ids(MAX_STOP_TOKEN_IDS),
    "ignore_eos": _flag,
    "max_tokens": _optional(_integer(1, _MAX_COUNT)),
    "min_tokens": _integer(0, _MAX_COUNT),
    "logprobs": _optional(_integer(0, MAX_LOGPROBS)),
    "prompt_logprobs": _optional(_integer(0, MAX_LOGPROBS)),
    "logit_bias": _biases,
    "bad_words": _strings(MAX_BAD_WORDS, MAX_BAD_WORD_CHARS),
    "bad_words_token_ids": _token_sequences,
    "begin_suppress_tokens": _token_ids(MAX_STOP_TOKEN_IDS),
    "allowed_token_ids": _token_ids(MAX_STOP_TOKEN_IDS),
    "timestamps": _timestamps,
    "structured_outputs": _structured_outputs,
    "detokenize": _flag,
    "skip_special_tokens": _flag,
    "visible_special_token_ids": _token_ids(MAX_VISIBLE_SPECIAL_TOKEN_IDS),
    "spaces_between_special_tokens": _flag,
    "include_stop_str_in_output": _flag,
}
