"""`StructuredOutputs`: one form at a time, bounded, and the same on both sides of the process boundary."""

from __future__ import annotations

import json
import pickle
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensorium import SamplingParams, StructuredOutputs
from sensorium.errors import InvalidRequestError, InvalidTypeError
from sensorium.structured_outputs import MAX_CHOICES, MAX_NESTING, MAX_REGEX_CHARS, MAX_SCHEMA_CHARS, MAX_SCHEMA_DEPTH

SCHEMA = {"type": "object", "properties": {"zeta": {"type": "string"}, "alpha": {"type": "integer"}}}
FORMS: list[dict[str, Any]] = [
    {"json": SCHEMA},
    {"json": json.dumps(SCHEMA, indent=4)},
    {"json": {}},
    {"json_object": True},
    {"regex": r"\d{3}-\d{4}"},
    {"grammar": 'start: "a" | "b"'},
    {"choice": ["yes", "no"]},
    {"json_object": True, "start_after": "</think>"},
]


def nested(depth: int) -> dict[str, Any]:
    """A schema of `depth` objects, one in the other."""
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_form_is_a_value(form: dict[str, Any]) -> None:
    one, other = StructuredOutputs(**form), StructuredOutputs(**form)
    assert one == other
    assert hash(one) == hash(other)
    assert pickle.loads(pickle.dumps(one)) == one
    assert one.kind in form


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_form_crosses_the_process_boundary_inside_sampling_params(form: dict[str, Any]) -> None:
    params = SamplingParams(n=2, seed=1, structured_outputs=StructuredOutputs(**form))
    for each in (params, params.for_output(0), params.for_output(1)):
        back = msgspec.msgpack.decode(msgspec.msgpack.encode(each), type=SamplingParams)
        assert back == each
        assert back.structured_outputs == params.structured_outputs


def test_a_schema_is_kept_as_text_in_the_order_of_its_keys() -> None:
    as_object, as_text = StructuredOutputs(json=SCHEMA), StructuredOutputs(json=json.dumps(SCHEMA, indent=2))
    assert as_object == as_text
    assert isinstance(as_object.json, str)
    assert list(json.loads(as_object.json)["properties"]) == ["zeta", "alpha"]


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"json_object": False},
        {"choice": []},
        {"json": SCHEMA, "regex": "a"},
        {"json_object": True, "json": SCHEMA},
        {"start_after": "</think>"},
    ],
    ids=str,
)
def test_exactly_one_form_is_set(form: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="expected exactly one of json, json_object, regex, grammar, choice"):
        StructuredOutputs(**form)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"json": "{"}, "json: got a text that is no JSON"),
        ({"json": "[" * 100_000}, "json: got a text that is no JSON"),
        ({"json": {"const": float("nan")}}, "json: got an object that is no JSON"),
        ({"json": {"const": b"bytes"}}, "json: got an object that is no JSON"),
        ({"json": "x" * (MAX_SCHEMA_CHARS + 1)}, "json: got 131073 characters"),
        ({"json": {"enum": ["x" * MAX_SCHEMA_CHARS]}}, "json: got more than 131072 characters"),
        ({"json": nested(MAX_SCHEMA_DEPTH + 1)}, "json: got brackets nested more than 64 deep"),
        ({"json": {"const": "\ud800"}}, "json: got half of a surrogate pair"),
        ({"regex": ""}, "regex: got 0 characters"),
        ({"regex": "a" * (MAX_REGEX_CHARS + 1)}, "regex: got 16385 characters"),
        ({"regex": "(" * (MAX_NESTING + 1)}, "regex: got brackets nested more than 100 deep"),
        ({"grammar": "start: " + "(" * 101 + '"a"' + ")" * 101}, "grammar: got brackets nested"),
        ({"grammar": "start: \ud800"}, "grammar: got half of a surrogate pair"),
        ({"choice": [str(i) for i in range(MAX_CHOICES + 1)]}, "choice: got 1025 choices"),
        ({"choice": ["a", ""]}, "choice: got 0 characters"),
        ({"choice": ["a" * 4096] * 40}, "choice: got 163840 characters in all"),
        ({"regex": "a", "start_after": ""}, "start_after: got 0 characters"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_too_large_or_no_text_is_refused(form: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^structured_outputs.{message}.*, expected "):
        StructuredOutputs(**form)


@pytest.mark.parametrize(
    "form",
    [
        {"json": 1},
        {"json": "[1]"},
        {"json": ["a"]},
        {"json_object": "yes"},
        {"regex": 3},
        {"grammar": b"start"},
        {"choice": "yes"},
        {"choice": [None]},
        {"choice": [1]},
        {"choice": {"a": 1}},
        {"regex": "a", "start_after": 5},
    ],
    ids=str,
)
def test_what_has_the_wrong_type_is_refused(form: dict[str, Any]) -> None:
    with pytest.raises(InvalidTypeError, match=r"^structured_outputs\.\w+: got a value of type"):
        StructuredOutputs(**form)


def test_depth_up_to_the_bound_passes() -> None:
    assert StructuredOutputs(json=nested(MAX_SCHEMA_DEPTH)).kind == "json"
    assert StructuredOutputs(regex="(" * MAX_NESTING + "a" + ")" * MAX_NESTING).kind == "regex"
    assert StructuredOutputs(regex="(a)" * 500).kind == "regex"


def test_choices_keep_their_order_and_lose_repetitions() -> None:
    assert StructuredOutputs(choice=["b", "a", "b"]).choice == ("b", "a")


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(_TEXT, _JSON, max_size=4))
def test_any_json_object_is_kept_whole(schema: dict[str, Any]) -> None:
    kept = StructuredOutputs(json=schema).json
    assert isinstance(kept, str)
    assert json.loads(kept) == schema


def test_sampling_params_take_nothing_else() -> None:
    with pytest.raises(InvalidTypeError, match="structured_outputs: got a value of type dict"):
        SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]
