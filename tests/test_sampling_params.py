"""`SamplingParams`: nothing gets past its bounds, and what it keeps is complete."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensorium.errors import InvalidRequestError, InvalidTypeError, RequestError
from sensorium.sampling_params import MAX_LOGIT_BIASES, MAX_N, SamplingParams

NUMBERS = (
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "temperature",
    "top_p",
    "min_p",
)
INTEGERS = ("n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs")
FLAGS = (
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308, -1e308, 10**400, np.float32("nan")])
def test_numbers_are_finite_and_bounded(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{name}: got .*, expected .*Change {name}"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["1", b"1", True, None, [1.0], object()], ids=lambda v: type(v).__name__)
def test_numbers_are_numbers(name: str, value: Any) -> None:
    with pytest.raises(InvalidTypeError, match=f"^{name}: got a value of type {type(value).__name__}"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [1.5, math.nan, "3", True, [1]], ids=str)
def test_integers_are_integers(name: str, value: Any) -> None:
    with pytest.raises(InvalidTypeError, match=f"^{name}: got"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [10**5000, -(10**5000)], ids=["huge", "very negative"])
def test_integers_are_bounded(name: str, value: int) -> None:
    """Python refuses to print integers of more than 4300 digits; the message must not depend on that."""
    with pytest.raises(InvalidRequestError, match=f"^{name}: got an integer of 16610 bits"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", [1, 0, "true", None], ids=str)
def test_flags_are_flags(name: str, value: Any) -> None:
    with pytest.raises(InvalidTypeError, match=f"^{name}: got"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "low", "high", "below", "above"),
    [
        ("n", 1, MAX_N, 0, MAX_N + 1),
        ("temperature", 0.0, 100.0, -0.01, 100.1),
        ("top_p", 0.001, 1.0, 0.0, 1.01),
        ("min_p", 0.0, 1.0, -0.01, 1.01),
        ("top_k", -1, 2**31 - 1, -2, 2**31),
        ("repetition_penalty", 0.01, 100.0, 0.0, 101.0),
        ("presence_penalty", -2.0, 2.0, -2.1, 2.1),
        ("frequency_penalty", -2.0, 2.0, -2.1, 2.1),
        ("seed", -(2**63), 2**63 - 1, -(2**63) - 1, 2**63),
        ("max_tokens", 1, 2**31 - 1, 0, 2**31),
        ("logprobs", 0, 128, -1, 129),
        ("prompt_logprobs", 0, 128, -1, 129),
    ],
)
def test_bounds(name: str, low: float, high: float, below: float, above: float) -> None:
    for value in (low, high):
        kept = getattr(SamplingParams(**{name: value}), name)  # type: ignore[arg-type]
        assert kept == (0 if (name, value) == ("top_k", -1) else value)
    for value in (below, above):
        with pytest.raises(InvalidRequestError, match=f"^{name}: got {value}, expected"):
            SamplingParams(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": [""]},
        {"stop": ["x" * 1025]},
        {"stop": ["x"] * 65},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": [2**40]},
        {"stop_token_ids": list(range(1025))},
        {"bad_words": ["x" * 257]},
        {"bad_words": ["x"] * 257},
        {"bad_words_token_ids": [[]]},
        {"bad_words_token_ids": [[1]] * 1025},
        {"bad_words_token_ids": [[1] * 1025]},
        {"logit_bias": {1: math.nan}},
        {"logit_bias": {1: 101.0}},
        {"logit_bias": {-1: 1.0}},
        *(
            {"logit_bias": {key: 1.0}}
            for key in ("a", "", " 1 ", "0_1", "+1", "01", "1.0", "-1", "\u0661", "\uff11", "1\n")
        ),
        {"logit_bias": {1: 1.0, "1": 1.0}},
        {"logit_bias": dict.fromkeys(range(MAX_LOGIT_BIASES + 1), 1.0)},
        {"min_tokens": 5, "max_tokens": 4},
        {"stop": "x", "detokenize": False},
    ],
    ids="-".join,
)
def test_collections_and_combinations_are_bounded(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=rf"^{next(iter(fields))}: got .*, expected "):
        SamplingParams(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": 5},
        {"stop": b"x"},
        {"stop": ["a", 5]},
        {"stop": {"a": 1}},
        {"stop_token_ids": 5},
        {"stop_token_ids": "12"},
        {"stop_token_ids": [1.0]},
        {"bad_words": [["a"]]},
        {"bad_words_token_ids": [1]},
        {"logit_bias": [1]},
        {"logit_bias": {1.0: 1.0}},
        {"logit_bias": {1: "1"}},
    ],
    ids=str,
)
def test_collections_hold_the_right_types(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidTypeError, match=rf"^{next(iter(fields))}: got a value of type"):
        SamplingParams(**fields)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(
    name=st.sampled_from([*NUMBERS, *INTEGERS, *FLAGS, "stop", "stop_token_ids", "bad_words", "logit_bias"]),
    value=_JSON,
)
def test_whatever_json_brings_is_kept_or_refused(name: str, value: Any) -> None:
    made = _made_or_refused({name: value})
    if isinstance(made, SamplingParams):
        assert SamplingParams(**{name: getattr(made, name)}) == made
    else:
        assert made.status == 400
        assert len(str(made)) < 300


def _made_or_refused(fields: dict[str, Any]) -> SamplingParams | RequestError:
    try:
        return SamplingParams(**fields)
    except RequestError as error:
        return error


def test_collections_are_kept_as_values_of_their_own() -> None:
    ids, bias, words = [5, np.int64(6)], {"3": 1, 4: np.float32(0.5)}, [[7, 8]]
    params = SamplingParams(stop="end", stop_token_ids=ids, logit_bias=bias, bad_words_token_ids=words, bad_words=None)  # type: ignore[arg-type]
    ids.append(9)
    bias["9"] = 1
    words[0].append(9)
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("end",), (5, 6), {3: 1.0, 4: 0.5})
    assert (params.bad_words, params.bad_words_token_ids) == ((), ((7, 8),))
    assert pickle.loads(pickle.dumps(params)) == params


def test_greedy() -> None:
    assert SamplingParams(temperature=0).greedy
    assert SamplingParams(temperature=1e-6).greedy
    assert SamplingParams(top_k=1, temperature=0.8).greedy
    assert not SamplingParams().greedy


def test_values_of_a_request_body() -> None:
    """A body's null means that the field was not given; an unknown field is named."""
    assert SamplingParams.from_optional(temperature=None, top_k=5, stop=None) == SamplingParams(top_k=5)
    with pytest.raises(InvalidTypeError, match="got 'best_of'"):
        SamplingParams.from_optional(best_of=3)


def test_end_token_ids() -> None:
    assert SamplingParams(stop_token_ids=[5]).end_token_ids([2, 3]) == {2, 3, 5}
    assert SamplingParams(stop_token_ids=[5], ignore_eos=True).end_token_ids([2, 3]) == {5}


def test_outputs_of_one_request() -> None:
    params = SamplingParams(n=3, seed=7, prompt_logprobs=1)
    first, second, third = (params.for_output(i) for i in range(3))
    assert first == SamplingParams(seed=7, prompt_logprobs=1)
    assert len({first.seed, second.seed, third.seed}) == 3
    assert second.prompt_logprobs is None
    assert all(-(2**63) <= (child.seed or 0) < 2**63 for child in (second, third))
    assert SamplingParams(n=2).for_output(1).seed is None
    with pytest.raises(IndexError, match="got 3, expected 0 to 2"):
        params.for_output(3)


def test_bad_words_are_banned_with_and_without_a_space_before() -> None:
    def encode(text: str) -> list[int]:
        return [ord(char) for char in text]

    params = SamplingParams(bad_words=["no", " no", " "], bad_words_token_ids=[[1]]).with_bad_word_ids(encode)
    assert params.bad_words_token_ids == ((1,), (110, 111), (32, 110, 111), (32,))
    assert SamplingParams().with_bad_word_ids(encode) == SamplingParams()
    assert SamplingParams(bad_words=["x"]).with_bad_word_ids(lambda text: []).bad_words_token_ids == ()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(stop_token_ids=[100]),
        SamplingParams(logit_bias={100: 1.0}),
        SamplingParams(bad_words_token_ids=[[1, 100]]),
        SamplingParams(min_tokens=11, max_tokens=None),
    ],
    ids=["stop_token_ids", "logit_bias", "bad_words_token_ids", "min_tokens"],
)
def test_checks_against_the_model(params: SamplingParams, request: pytest.FixtureRequest) -> None:
    params.check_against(vocab_size=101, max_model_len=30, num_prompt_tokens=19)
    with pytest.raises(InvalidRequestError, match=request.node.callspec.id):
        params.check_against(vocab_size=100, max_model_len=30, num_prompt_tokens=20)


def test_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, sensorium.sampling_params, sensorium.outputs; print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
