"""Schemas mean what JSON Schema says: exact numbers, no dead ends, unions with defaults, annotations."""

from __future__ import annotations

import contextlib
import json
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from sensorium.errors import InvalidRequestError
from sensorium.grammar.matchers import compile_grammar
from sensorium.grammar.reasons import told
from sensorium.grammar.schemas.ready import with_ready_schemas
from sensorium.structured_outputs import StructuredOutputs
from tests.grammar.schemas import check
from tests.grammar.walks import index_of
from tests.helpers.checkpoints import make_tokenizer

INDEX = index_of(make_tokenizer())
ENDS = frozenset(INDEX.eos_tokens)
ID = 1234567890123456789
CLOSED = {"type": "object", "additionalProperties": False}
INTEGER = {"type": "integer"}


def allowed(matcher: LLMatcher) -> list[int]:
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


def walk(matcher: LLMatcher, rng: random.Random, max_tokens: int = 300) -> str | None:
    """What is drawn by chance; None where it hasn't ended by then. A dead end fails."""
    matcher = matcher.deep_copy()
    token_ids: list[int] = []
    while len(token_ids) < max_tokens:
        if matcher.is_stopped():
            break
        tokens = allowed(matcher)
        assert not matcher.is_error(), (INDEX.decode_str(token_ids), matcher.get_error())
        assert tokens or matcher.is_accepting(), INDEX.decode_str(token_ids)
        token_id = rng.choice(_steered(tokens, len(token_ids), rng))
        if token_id in ENDS:
            break
        assert matcher.consume_token(token_id)
        token_ids.append(token_id)
    else:
        return None
    assert not matcher.is_error(), (INDEX.decode_str(token_ids), matcher.get_error())
    return INDEX.decode_str(token_ids)


_PUNCTUATION = frozenset(token_id for token_id in range(256) if INDEX.decode_bytes([token_id]) in b'"{}[]:,')


def _steered(tokens: list[int], length: int, rng: random.Random) -> list[int]:
    """Mostly what goes on with the structure, so that walks get through more than one string."""
    structure = [each for each in tokens if each in _PUNCTUATION]
    return structure if structure and rng.random() < 0.6 else tokens


def answers(schema: Any, count: int = 12, **form: Any) -> list[str]:
    """Whole answers of a schema, all of which are valid; raises `InvalidRequestError` where it is refused."""
    matcher = compile_grammar(StructuredOutputs(json=schema, **form), INDEX)
    rng = random.Random(json.dumps(schema))
    found = [text for _ in range(count) if (text := walk(matcher, rng)) is not None]
    for text in found:
        check(text, schema)
    return found


# Numbers

BIG: dict[str, Any] = {
    "enum": {"enum": [ID]},
    "const": {"const": -ID},
    "beyond 64 bits": {"const": 2**70 + 1},
    "a float": {"enum": [1e22, 2.0**60]},
    "with others": {"enum": [1, "a", ID, {"id": ID, "x": [None]}]},
    "property": {**CLOSED, "properties": {"id": {"enum": [ID, ID + 2]}, "n": {"enum": [1, 2]}}, "required": ["id"]},
    "optional": {**CLOSED, "properties": {"a": {"const": 1}, "id": {"const": ID}, "z": {"const": True}}},
    "open object": {
        "type": "object",
        "properties": {"id": {"const": ID}},
        "required": ["id"],
        "additionalProperties": {"const": 1},
    },
    "map": {"type": "object", "additionalProperties": {"enum": [ID]}},
    "list": {"type": "array", "items": {"enum": [ID, -ID]}, "minItems": 1, "maxItems": 3},
    "endless list": {"type": "array", "items": {"enum": [ID, -ID]}},
    "tuple": {"type": "array", "prefixItems": [{"const": ID}, {"const": 1}], "items": False, "minItems": 1},
    "long tuple": {
        "type": "array",
        "prefixItems": [{"const": ID}],
        "items": {"const": 0},
        "minItems": 2,
        "maxItems": 4,
    },
    "nullable": {"anyOf": [{"enum": [ID]}, {"type": "null"}]},
    "of a type": {"type": "integer", "enum": [ID, "x"]},
    "one of": {"oneOf": [{"const": ID}, {"const": ID + 1}]},
    "reference": {"$ref": "#/$defs/id", "$defs": {"id": {"title": "Id", "const": ID, "description": "An id."}}},
    "all of several": {
        "allOf": [{"enum": [1, ID, True]}, INTEGER, {"$ref": "#/$defs/x"}],
        "$defs": {"x": {"enum": [ID]}},
    },
    "a pattern": {
        **CLOSED,
        "properties": {"i": {"const": ID}},
        "required": ["i"],
        "patternProperties": {"^i$": INTEGER},
    },
    "all of one": {"allOf": [{"$ref": "#/$defs/id"}], "$defs": {"id": {"const": ID}}},
    "recursion": {
        "$ref": "#/$defs/n",
        "$defs": {
            "n": {
                **CLOSED,
                "properties": {"id": {"const": ID}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/n"}]}},
                "required": ["id", "next"],
            }
        },
    },
}


@pytest.mark.parametrize("case", BIG)
def test_constants_beyond_doubles_are_exact(case: str) -> None:
    """Another number was the only one allowed: 1234567890123456768."""
    found = answers(BIG[case], 20)
    assert found
    assert any(str(number) in text for text in found for number in (ID, ID + 1, 2**70 + 1, 10**22))


@pytest.mark.parametrize(
    "wrapped", ["start: %json {}", 'start: "id " value\nvalue: %json {}', "start: (%json {} | /x+/)"]
)
def test_schemas_within_grammars_are_exact_too(wrapped: str) -> None:
    """As those of functions are."""
    schema = {"enum": [ID, ID + 1], "x-guidance": {"whitespace_flexible": False}}
    text = wrapped.replace("{}", json.dumps(schema))
    matcher = compile_grammar(StructuredOutputs(grammar=text), INDEX)
    rng = random.Random(0)
    found = {walk(matcher, rng) for _ in range(20)}
    assert any(str(ID) in (each or "") for each in found)


def test_texts_and_comments_of_a_grammar_are_no_schemas() -> None:
    grammar = 'start: "%json {\\"enum\\":[1e3]}" /%json {}/ // %json {"enum": [12345678901234567890]}\n'
    assert with_ready_schemas(grammar, INDEX).strip() == grammar.strip()


BOUNDS = [
    {"type": "integer", "minimum": 2**60 + 1, "maximum": 2**60 + 1000},
    {"type": "integer", "exclusiveMinimum": 2**60, "exclusiveMaximum": 2**60 + 1000},
    {"type": "integer", "minimum": 2**60, "exclusiveMinimum": True, "maximum": 2**60 + 600},
    {"type": "integer", "minimum": -(2**63), "maximum": -(2**63) + 5000},
    {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    {"type": "integer", "minimum": 0, "maximum": 2**64 - 1},
    {"type": "integer", "minimum": 2**63 - 3000, "maximum": 2**70},
    {"type": "integer", "minimum": 5, "exclusiveMinimum": -(2**62), "maximum": 8},
    {"type": "number", "minimum": 2**60 + 1, "maximum": 2**60 + 10**9},
    {"type": ["number", "integer"], "minimum": 2**60 + 1, "maximum": 2**60 + 10**12},
    {"type": ["integer", "null"], "minimum": 2**60 + 1, "maximum": 2**60 + 1000},
    {"type": "integer", "allOf": [{"minimum": 2**60 + 1}, {"maximum": 2**60 + 10**12}]},
    {"type": "integer", "minimum": 2**53 + 1, "maximum": 2**53 + 20, "multipleOf": 4},
    {"type": "number", "minimum": 0.5, "maximum": 1e300},
    {"type": "number", "minimum": -1e300, "maximum": 1.7976931348623157e308},
    {"type": "integer", "minimum": -1e300, "maximum": 1e300},
]


@pytest.mark.parametrize("schema", BOUNDS, ids=str)
def test_bounds_beyond_doubles_hold(schema: dict[str, Any]) -> None:
    """They were those of the nearest double, inwards or outwards."""
    plain = {key: value for key, value in schema.items() if value is not True}
    matcher = compile_grammar(StructuredOutputs(json=schema), INDEX)
    rng = random.Random(1)
    for _ in range(40):
        text = walk(matcher, rng)
        if text is not None:
            check(text, plain)


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "integer", "minimum": 2**53 + 1, "maximum": 2**53 + 1}, "minimum and maximum"),
        ({"type": "integer", "minimum": 2**64}, "minimum: got 18446744073709551616"),
        ({"type": "integer", "maximum": -(2**70)}, "maximum"),
        ({"type": "integer", "multipleOf": 2**53 + 1}, "multipleOf: got 9007199254740993"),
        ({"enum": [ID], "minimum": 3}, r"const and enum: got numbers beyond 2\^53 beside \['minimum'\]"),
        ({"not": {"const": ID}}, "not"),
        ({"type": "string", "enum": [ID]}, "no finite value fits it"),
    ],
)
def test_numbers_that_can_t_be_held_to_are_refused(schema: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named):
        compile_grammar(StructuredOutputs(json=schema), INDEX)


def test_constants_behind_a_thousand_references_are_answered_or_refused() -> None:
    definitions: dict[str, Any] = {
        f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}, {"const": i}]} for i in range(1000)
    }
    schema = {"$ref": "#/$defs/a0", "$defs": {**definitions, "a1000": {"const": ID}}}
    with pytest.raises(InvalidRequestError, match="what it refers to is nested too deep"):
        compile_grammar(StructuredOutputs(json=schema), INDEX)


@pytest.mark.parametrize("text", ['{"enum": [1e400]}', '{"minimum": -1e999}', '{"const": NaN}'])
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"structured_outputs\.json: got .* no JSON"):
        StructuredOutputs(json=text)


@pytest.mark.parametrize("value", [-0.0, 1.0, 1e-7, 0.12345678901234567, 1e15, 123456.75, 2**53, -(2**53), 1.5e300])
def test_other_numbers_are_exact_as_they_were(value: float) -> None:
    (text,) = set(answers({"const": value}, 4)) or {str(value)}
    assert float(text) == value


# Dead ends

DEAD: dict[str, Any] = {
    "a listed property": {
        **CLOSED,
        "properties": {"score": INTEGER},
        "required": ["score"],
        "patternProperties": {"^score$": INTEGER},
    },
    "several": {
        **CLOSED,
        "properties": {"a": INTEGER, "b": {"type": "boolean"}},
        "required": ["b"],
        "patternProperties": {"^(a|b|c)$": {"type": ["integer", "boolean"]}},
    },
    "only some": {**CLOSED, "properties": {"a": INTEGER}, "patternProperties": {"^[ab]$": {"maximum": 5}}},
    "required only": {**CLOSED, "required": ["a"], "patternProperties": {"^a$": INTEGER}},
    "nothing": {**CLOSED, "patternProperties": {"[^\\s\\S]": INTEGER}},
    "merged": {
        "allOf": [
            {"type": "object", "properties": {"score": INTEGER}, "required": ["score"]},
            {"patternProperties": {"^score$": {"maximum": 5}}, "additionalProperties": False},
        ]
    },
    "within": {
        **CLOSED,
        "properties": {
            "x": {
                "type": "array",
                "maxItems": 2,
                "items": {**CLOSED, "properties": {"q": INTEGER}, "patternProperties": {"^q$": {}}},
            }
        },
    },
    "referred to": {
        "$ref": "#/components/x",
        "components": {"x": {**CLOSED, "properties": {"a": INTEGER}, "patternProperties": {"^a$": True}}},
    },
    "quoted": {**CLOSED, "properties": {'a"ü': INTEGER}, "patternProperties": {'^a"ü$': {"minimum": 0}}},
    "an endless option": {
        **CLOSED,
        "properties": {"n": {"$ref": "#/$defs/a"}, "m": INTEGER},
        "$defs": {"a": {**CLOSED, "properties": {"a": {"$ref": "#/$defs/a"}}, "required": ["a"]}},
    },
    "an endless choice": {
        "anyOf": [{"$ref": "#/$defs/a"}, {"const": 1}],
        "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}, "minItems": 1}},
    },
    "a recursion with an end": {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}, "maxItems": 1}},
    },
}


@pytest.mark.parametrize("case", DEAD)
def test_no_answer_comes_to_a_dead_end(case: str) -> None:
    """Streams broke off in the middle, behind a comma that nothing could follow."""
    assert answers(DEAD[case], 40)


@pytest.mark.parametrize(
    "schema",
    [
        {
            "$ref": "#/$defs/a",
            "$defs": {"a": {**CLOSED, "properties": {"a": {"$ref": "#/$defs/a"}}, "required": ["a"]}},
        },
        {"type": "array", "minItems": 1, "items": {"$ref": "#"}},
        {
            **CLOSED,
            "required": ["a"],
            "properties": {"a": INTEGER},
            "minProperties": 2,
            "patternProperties": {"^a$": {}},
        },
        {**CLOSED, "required": ["x"]},
        {**CLOSED, "properties": {"a": INTEGER}, "minProperties": 2},
        {"type": "array", "minItems": 3, "maxItems": 2},
        {"type": "string", "minLength": 3, "maxLength": 2},
        {"type": "string", "pattern": "^a$", "minLength": 2},
        {"type": "integer", "minimum": 1, "maximum": 5, "multipleOf": 10},
        {"allOf": [{"type": "string"}, INTEGER]},
        {"allOf": [{"const": 1}, {"const": 2}]},
        {"enum": []},
        {"anyOf": []},
        {"type": []},
        {"not": INTEGER},
        {"const": 1, "type": "string"},
        {"type": "string", "pattern": "^(?=a)a$"},
        {"type": "string", "format": "date", "pattern": "^x"},
    ],
    ids=str,
)
def test_what_nothing_fits_is_refused_before_it_begins(schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=r"structured_outputs\.json: got one that can't be held to \("):
        compile_grammar(StructuredOutputs(json=schema), INDEX)


_NAMES = st.sampled_from(["a", "b", "ab", 'c"', "ü"])
_LEAVES = st.one_of(
    st.sampled_from(
        [{}, True, False, {"type": "null"}, {"type": "boolean"}, INTEGER, {"type": "string", "maxLength": 2}]
    ),
    st.builds(
        lambda values: {"enum": values}, st.lists(st.sampled_from([1, 2, "a", None, ID, {"a": 1}, [1]]), max_size=3)
    ),
    st.builds(lambda value: {"const": value}, st.sampled_from([0, "x", {"a": "b"}, [], ID, 1.5])),
    st.builds(
        lambda low, span, step: {"type": "integer", "minimum": low, "maximum": low + span, "multipleOf": step},
        st.integers(-20, 20),
        st.integers(-1, 6),
        st.sampled_from([1, 2, 7]),
    ),
    st.builds(lambda low: {"type": "number", "minimum": low, "maximum": low + 0.5}, st.integers(-3, 3)),
    st.builds(
        lambda pattern, low: {"type": "string", "pattern": pattern, "minLength": low, "maxLength": 3},
        st.sampled_from(["^a*$", "^[ab]$", "b", "^$", "^x.y$"]),
        st.integers(0, 4),
    ),
    st.sampled_from([{"$ref": "#/$defs/r"}, {"$ref": "#/$defs/s"}]),
)


def _objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries(
        {"type": st.just("object")},
        optional={
            "properties": st.dictionaries(_NAMES, inner, max_size=3),
            "required": st.lists(_NAMES, max_size=2, unique=True),
            "additionalProperties": st.one_of(st.booleans(), inner),
            "patternProperties": st.dictionaries(
                st.sampled_from(["^a$", "^[ab]$", "^(a|b|ab)$", "b", '^c"$', "^ü?$", "[^\\s\\S]"]), inner, max_size=2
            ),
            "minProperties": st.integers(0, 3),
            "maxProperties": st.integers(0, 3),
        },
    )


def _lists(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries(
        {"type": st.just("array"), "maxItems": st.integers(0, 3)},
        optional={
            "items": st.one_of(st.booleans(), inner),
            "prefixItems": st.lists(inner, max_size=2),
            "minItems": st.integers(0, 3),
        },
    )


def _unions(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(
        lambda kind, options: {kind: options},
        st.sampled_from(["anyOf", "allOf", "oneOf"]),
        st.lists(inner, min_size=1, max_size=3),
    )


_SCHEMAS = st.recursive(_LEAVES, lambda inner: st.one_of(_objects(inner), _lists(inner), _unions(inner)), max_leaves=6)


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(_SCHEMAS, _SCHEMAS, _SCHEMAS, st.integers(0, 10_000))
def test_random_schemas_have_no_dead_ends(root: Any, first: Any, second: Any, seed: int) -> None:
    """Whatever is accepted, every walk through it goes on until it is valid."""
    schema = {**(root if isinstance(root, dict) else {"anyOf": [root]}), "$defs": {"r": first, "s": second}}
    try:
        matcher = compile_grammar(StructuredOutputs(json=schema), INDEX)
    except InvalidRequestError:
        return
    rng = random.Random(seed)
    for _ in range(4):
        text = walk(matcher, rng, 120)
        if text is not None:
            with contextlib.suppress(RecursionError):  # the validator's, where a reference comes back to itself at once
                check(text, schema)


# Unions

CAT_AND_DOG = [
    {
        "type": "object",
        "properties": {"kind": {"const": kind, "default": kind, "type": "string"}, name: INTEGER},
        "required": [name],
        "additionalProperties": False,
    }
    for kind, name in (("cat", "lives"), ("dog", "age"))
]
UNIONS: dict[str, Any] = {
    "tags with defaults": {"oneOf": CAT_AND_DOG},
    "tags with defaults, referred to": {
        "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
        "discriminator": {"propertyName": "kind", "mapping": {"cat": "#/$defs/Cat", "dog": "#/$defs/Dog"}},
        "$defs": {"Cat": CAT_AND_DOG[0], "Dog": CAT_AND_DOG[1]},
    },
    "or nothing": {"oneOf": [*CAT_AND_DOG, {"type": "null"}]},
    "tags of several values": {
        "oneOf": [
            {**CLOSED, "properties": {"k": {"enum": values}}, "title": str(values)}
            for values in (["a", "b"], ["c"], [1, 2])
        ]
    },
    "tags that are numbers": {
        "oneOf": [{**CLOSED, "properties": {"k": {"const": k}}, "required": ["k"]} for k in (1, 2)]
    },
    "numbers": {"oneOf": [{"const": 1}, {"enum": [2, 3]}]},
    "types": {"oneOf": [{"$ref": "#/$defs/i"}, {"type": "string", "maxLength": 2}], "$defs": {"i": INTEGER}},
}


@pytest.mark.parametrize("case", UNIONS)
def test_unions_whose_options_exclude_each_other(case: str) -> None:
    """The error named an option of the library that no setting has."""
    assert answers(UNIONS[case], 20)


def test_a_union_of_pydantic_with_a_default_discriminator() -> None:
    from typing import Annotated, Literal

    import pydantic

    class Cat(pydantic.BaseModel):
        kind: Literal["cat"] = "cat"
        lives: int

    class Dog(pydantic.BaseModel):
        kind: Literal["dog"] = "dog"
        age: int

    class Home(pydantic.BaseModel):
        pet: Annotated[Cat | Dog, pydantic.Field(discriminator="kind")]
        pets: list[Annotated[Cat | Dog, pydantic.Field(discriminator="kind")]] = pydantic.Field(max_length=1)

    matcher = compile_grammar(StructuredOutputs(json=Home.model_json_schema()), INDEX)
    rng = random.Random(0)
    texts = [text for _ in range(60) if (text := walk(matcher, rng)) is not None]
    assert {Home.model_validate_json(text).pet.kind for text in texts} == {"cat", "dog"}


def test_a_union_that_can_t_be_told_apart_says_what_to_do() -> None:
    with pytest.raises(InvalidRequestError, match="Use anyOf, or give each option a required property") as error:
        compile_grammar(StructuredOutputs(json={"oneOf": [INTEGER, {"type": "number"}]}), INDEX)
    assert "coerce" not in str(error.value)
    assert "Enable" not in str(error.value)


# Annotations


@pytest.mark.parametrize("name", ["password", "int64", "binary", "iri-reference", "phone", "", "x y", "uint8"])
@pytest.mark.parametrize("kind", ["string", "integer"])
def test_formats_that_nobody_knows_say_nothing(name: str, kind: str) -> None:
    """`{"format": "password"}`, pydantic's SecretStr, was a 400."""
    schema = {**CLOSED, "properties": {"key": {"type": kind, "format": name, "maxLength": 4}}, "required": ["key"]}
    assert answers({**schema, "$defs": {"x": {"format": name}}}, 6)


@pytest.mark.parametrize("name", ["date", "date-time", "uuid", "ipv4", "email"])
def test_known_formats_are_held_to(name: str) -> None:
    for text in answers({"type": "string", "format": name}, 6):
        assert len(json.loads(text)) >= 3


@pytest.mark.parametrize(
    "more",
    [
        {"$comment": "c", "title": "t", "description": "d", "default": ID, "examples": [ID], "deprecated": True},
        {"readOnly": True, "writeOnly": False, "contentEncoding": "base64", "contentMediaType": "text/plain"},
        {"$schema": "http://json-schema.org/draft-04/schema#", "id": "urn:x"},
        {"$schema": "https://json-schema.org/draft/2019-09/schema", "$id": "urn:x", "$vocabulary": {}},
        {"$anchor": "a", "$dynamicAnchor": "b", "contentSchema": {"const": ID}},
        {"x-order": 1, "xml": {"name": "x"}, "example": ID, "externalDocs": {}, "nullable": False, "enumNames": ["a"]},
    ],
    ids=str,
)
def test_annotations_of_every_draft_say_nothing(more: dict[str, Any]) -> None:
    assert answers({**more, "type": "integer", "minimum": 0, "maximum": 9}, 4)
    assert answers({**CLOSED, "properties": {"a": {"maximum": 9, "minimum": 0, **more, "type": "integer"}}}, 4)


def test_counts_may_be_written_as_floats() -> None:
    assert answers({"type": "string", "minLength": 1.0, "maxLength": 2.0}, 6)
    assert answers({"type": "array", "items": {"const": 1}, "minItems": 2.0, "maxItems": 2.0}, 6)


# Reasons


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ('at 2(8): failed to compile JSON schema: Unimplemented keys: ["not"]', 'Unimplemented keys: ["not"]'),
        ("oneOf constraints are not supported. Enable 'coerce_one_of' option to approximate", "oneOf has options that"),
        ("lexer precomputation failed; either increase limits.initial_lexer_fuel", "it is too large, or it leaves"),
        (
            "Current row has 2001 items; max is 2000; consider making your grammar left-recursive",
            "it leaves too much open",
        ),
        ("something; enable the option foo", "it can't be compiled"),
        ("NoExtensionBias\n<non-verbose/>", "nothing that it describes can follow"),
        ("Unsatisfiable schema: range [10, 0] does not contain a multiple of 10", "no number within its bounds"),
        ("", "no reason given"),
    ],
)
def test_reasons_are_told_without_the_library_s_own_words(reason: str, expected: str) -> None:
    assert told(reason).startswith(expected)
