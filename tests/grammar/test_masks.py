"""What masks allow is what the form means, for every kind of tokenizer that generates."""

from __future__ import annotations

import itertools
import json
import random
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from sensorium.grammar import matchers
from sensorium.grammar.messages import AddRow, AppendToken, LookAhead, RemoveRow
from sensorium.structured_outputs import StructuredOutputs
from sensorium.token_masks import RowState
from tests.grammar.schemas import check, random_schema
from tests.grammar.walks import Rows, index_of, row_of
from tests.helpers.checkpoints import make_tokenizer
from tests.helpers.tiny_tokenizers import byte_fallback_bpe, byte_fallback_unigram, byte_level_bpe, wrapped

DEMO = "sensorium/demo_model/tokenizer.json"


def demo_tokenizer() -> Any:
    return PreTrainedTokenizerFast(tokenizer_file=DEMO, eos_token="<|im_end|>")


TOKENIZERS = {
    "bytes": make_tokenizer(),
    "byte-level BPE": wrapped(byte_level_bpe()),
    "BPE with byte fallback": wrapped(byte_fallback_bpe()),
    "unigram with byte fallback": wrapped(byte_fallback_unigram()),
    "demo": demo_tokenizer(),
}
INDEXES = {name: index_of(tokenizer, num_padding=40) for name, tokenizer in TOKENIZERS.items()}


def text_of(name: str, token_ids: list[int]) -> str:
    return bytes(INDEXES[name].decode_bytes(token_ids)).decode()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_whatever_is_drawn_under_a_schema_validates(name: str) -> None:
    rng = random.Random(f"schemas {name}")
    ends = set(INDEXES[name].eos_tokens)
    rows = Rows(INDEXES[name], 1)
    num_ended = 0
    for _ in range(60):
        schema = random_schema(rng)
        rows.add(0, StructuredOutputs(json=schema))
        token_ids = rows.walk(0, rng, ends)
        if token_ids is not None:
            num_ended += 1
            check(text_of(name, token_ids), schema)
    assert num_ended >= 55


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_tokenizer_can_write_any_json(name: str) -> None:
    value = {"text": 'Grüße, 日本 😀\t"quoted" \\ /', "list": [1, -2.5e3, True, None, {}], "Ω": {"deep": [[]]}}
    for text in (json.dumps(value, ensure_ascii=False), json.dumps(value, indent=2, ensure_ascii=False)):
        token_ids = TOKENIZERS[name](text, add_special_tokens=False)["input_ids"]
        if text_of(name, token_ids).startswith(" "):  # sentencepiece puts a space, a token of its own, before the text
            del token_ids[0]
        row = row_of(StructuredOutputs(json_object=True), INDEXES[name])
        for token_id in token_ids:
            row.append(token_id)
        assert row.state is RowState.COMPLETE, (name, text, row.error)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("pattern", [r"[0-9]{2,4}", r"(ja|nein|vielleicht)!?", r"[α-ω]{1,3}", r"^a/b\.c$", "(?i)yes"])
def test_outputs_match_their_expression(name: str, pattern: str) -> None:
    rng = random.Random(f"{pattern} {name}")
    ends = set(INDEXES[name].eos_tokens)
    rows = Rows(INDEXES[name], 1)
    for _ in range(5):
        rows.add(0, StructuredOutputs(regex=pattern))
        token_ids = rows.walk(0, rng, ends)
        assert token_ids is not None
        assert re.fullmatch(pattern, text_of(name, token_ids))


@settings(max_examples=60)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12), min_size=1, max_size=6),
    st.randoms(use_true_random=False),
)
def test_a_choice_is_one_of_the_strings_whatever_they_hold(choices: list[str], rng: random.Random) -> None:
    rows = Rows(INDEXES["bytes"], 1)
    rows.add(0, StructuredOutputs(choice=choices))
    token_ids = rows.walk(0, rng, set(INDEXES["bytes"].eos_tokens))
    assert token_ids is not None
    assert text_of("bytes", token_ids) in choices


@pytest.mark.parametrize(
    ("grammar", "expected"),
    [
        ('start: "x" %json {"type": "boolean"} "y"', r"x(true|false)y"),
        ('start: a ";" a\na: /[0-9]/ | "(" a ")"', r"\(*[0-9]\)*;\(*[0-9]\)*"),
        ('root ::= "a" digit+ "z"\ndigit ::= [0-9]', r"a[0-9]+z"),
        ('root ::= item ("," item)*\nitem ::= "yes" | "no"', r"(yes|no)(,(yes|no))*"),
    ],
)
def test_outputs_follow_their_grammar(grammar: str, expected: str) -> None:
    rng = random.Random(grammar)
    rows = Rows(INDEXES["byte-level BPE"], 1)
    for _ in range(10):
        rows.add(0, StructuredOutputs(grammar=grammar))
        token_ids = rows.walk(0, rng, set(INDEXES["byte-level BPE"].eos_tokens))
        assert token_ids is not None
        assert re.fullmatch(expected, text_of("byte-level BPE", token_ids))


def test_an_end_is_allowed_exactly_where_the_form_accepts() -> None:
    index, tokenizer = INDEXES["bytes"], TOKENIZERS["bytes"]
    end = tokenizer.eos_token_id
    one = tokenizer.convert_tokens_to_ids("1")
    rows = Rows(index, 2, (end,))
    rows.add(0, StructuredOutputs(regex="[0-9]{2,3}"))
    rows.add(1, StructuredOutputs(regex="[0-9]{2,3}"), hides_end=True)
    for num_tokens in range(3):
        digits = {tokenizer.convert_tokens_to_ids(str(i)) for i in range(10)}
        assert set(rows.allowed(0)) == digits | ({end} if num_tokens == 2 else set())
        assert set(rows.allowed(1)) == digits
        rows.append(0, one)
        rows.append(1, one)
    assert rows.state(0) is RowState.COMPLETE
    assert rows.state(1) is RowState.COMPLETE


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_token_is_forbidden_that_spells_what_must_come(name: str) -> None:
    """Where text is certain, the library forced the tokens that it would choose itself, and forbade the model's own."""
    tokenizer, index = TOKENIZERS[name], INDEXES[name]
    vocabulary = {i: bytes(index.decode_bytes([i])) for i in tokenizer.get_vocab().values()}
    shape = {"properties": {"color": {"const": "red"}, "kind": {"const": "ring"}}, "required": ["color", "kind"]}
    forms_and_starts = [
        (StructuredOutputs(json={"type": "object", **shape}), '{"color": "red", ', '"kind": "ring"'),
        (StructuredOutputs(regex="yes, the quick brown"), "yes, ", "the quick brown"),
        (StructuredOutputs(choice=["north east"]), "nor", "th east"),
        (StructuredOutputs(grammar='start: "a the" " lazy"'), "a ", "the lazy"),
    ]
    for form, start, rest in forms_and_starts:
        rows = Rows(index, 1)
        rows.add(0, form)
        for byte in start.encode():
            rows.append(0, next(i for i, spelt in vocabulary.items() if spelt == bytes([byte])))
        begins_rest = {i for i, spelt in vocabulary.items() if spelt and rest.encode().startswith(spelt)}
        assert begins_rest <= set(rows.allowed(0))


def test_ids_without_a_token_never_come() -> None:
    index = INDEXES["bytes"]
    rows = Rows(index, 1)
    rows.add(0, StructuredOutputs(regex="(.|\n)*"))
    assert max(rows.allowed(0)) < len(TOKENIZERS["bytes"])
    assert index.vocab_size == len(TOKENIZERS["bytes"]) + 40


def test_blanks_between_the_parts_of_json_are_bounded() -> None:
    tokenizer = TOKENIZERS["bytes"]
    space, line = tokenizer("\n ", add_special_tokens=False)["input_ids"][::-1]
    rows = Rows(INDEXES["bytes"], 1)
    rows.add(0, StructuredOutputs(json={"type": "array", "items": {"type": "integer"}}))
    rows.append(0, tokenizer.convert_tokens_to_ids("["))
    rows.append(0, line)
    for _ in range(64):
        assert space in rows.allowed(0)
        rows.append(0, space)
    assert not {space, line} & set(rows.allowed(0))


def test_a_form_may_begin_behind_a_text_that_lies_across_tokens() -> None:
    tokenizer = TOKENIZERS["bytes"]
    rows = Rows(INDEXES["bytes"], 1)
    rows.add(0, StructuredOutputs(choice=["yes", "no"], start_after="</think>"))
    for token_id in tokenizer("so </thin </th</think", add_special_tokens=False)["input_ids"]:
        assert rows.state(0) is RowState.FREE
        rows.append(0, token_id)
    rows.append(0, tokenizer.convert_tokens_to_ids(">"))
    assert rows.state(0) is RowState.HELD
    assert text_of("bytes", sorted(rows.allowed(0))) == "ny"


def test_a_row_that_comes_back_goes_on_where_it_was() -> None:
    """A request that was preempted brings the tokens that it had."""
    tokenizer = TOKENIZERS["bytes"]
    form = StructuredOutputs(json={"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    text = 'hm</think>{"a": 12'
    token_ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    for start_after, known in ((None, token_ids[10:]), ("</think>", token_ids)):
        rows = Rows(INDEXES["bytes"], 2)
        each = StructuredOutputs(json=form.json, start_after=start_after)
        rows.add(0, each)
        for token_id in known:
            rows.append(0, token_id)
        rows.add(1, each, known)
        assert rows.allowed(0) == rows.allowed(1)
        assert tokenizer.convert_tokens_to_ids("}") in rows.allowed(1)


def test_outputs_of_one_form_use_up_no_bounds_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of a matcher share the lexer's states and their bound: one long output ended all others of its form."""
    monkeypatch.setattr(matchers, "LIMITS", matchers.LLParserLimits(max_lexer_states=3000, verbose_errors=False))
    index = index_of(TOKENIZERS["bytes"])
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^[a-z]{1,900}$"}}, "required": ["a"]}
    form, rng = StructuredOutputs(json=schema), random.Random(0)
    rows = Rows(index, 3)
    for slot in range(3):
        rows.add(slot, form)
    letters = [TOKENIZERS["bytes"].convert_tokens_to_ids(char) for char in "abcxyz"]
    for token_id in TOKENIZERS["bytes"]('{"a":"', add_special_tokens=False)["input_ids"]:
        for slot in range(3):
            rows.append(slot, token_id)
    for i in range(700):
        for slot in range(3) if i < 300 else (i % 3,):
            rows.append(slot, rng.choice(letters))
            assert set(letters) <= set(rows.allowed(slot))


def test_a_form_that_had_to_leave_is_compiled_again_only_if_that_is_quick() -> None:
    rows = Rows(INDEXES["bytes"], 1)
    store = rows.store
    store._max_bytes = 0  # room for one
    quick, slow, other = (StructuredOutputs(choice=[text]) for text in ("quick", "slow", "other"))
    for form in (quick, slow, other):
        store.load(form)
    assert len(store) == 1
    assert store.matcher(quick) is not None
    store._compile_s[hash(slow)] = 3.0
    failures = rows.update(AddRow(0, slow, [], False))
    assert failures[0].status == 503
    assert rows.state(0) is RowState.FAILED
    assert rows.update(RemoveRow(0)) == {}
    rows.add(0, slow)
    assert rows.state(0) is RowState.HELD


def test_a_row_whose_grammar_is_too_ambiguous_fails_alone() -> None:
    rows = Rows(INDEXES["bytes"], 2)
    explosive = "start: a0\n" + "\n".join(f"a{i}: a{i + 1} a{i + 1} | a{i + 1}" for i in range(60)) + '\na60: "x" | ""'
    rows.add(0, StructuredOutputs(grammar=explosive))
    rows.add(1, StructuredOutputs(regex="x{200}"))
    x = TOKENIZERS["bytes"].convert_tokens_to_ids("x")
    failures = {}
    for _ in range(100):
        failures |= rows.update(AppendToken(0, x), AppendToken(1, x))
        if failures:
            break
    assert failures.keys() == {0}
    assert "the output can't go on" in failures[0].message
    assert rows.allowed(1) == [x]


@pytest.mark.parametrize("name", ["bytes", "byte-level BPE"])
def test_masks_behind_drafts_are_those_that_come_when_the_drafts_do(name: str) -> None:
    rng, index = random.Random(name), INDEXES[name]
    ends = tuple(index.eos_tokens)
    forms = [
        StructuredOutputs(json=random_schema(rng)),
        StructuredOutputs(regex="[a-c]{3}(x|yz)"),
        StructuredOutputs(choice=["aaa", "abc"], start_after="a"),
    ]
    for form, hides_end in itertools.product(forms * 3, (False, True)):
        ahead, plain = Rows(index, 5, ends), Rows(index, 1, ends)
        ahead.add(0, form, hides_end=hides_end)
        plain.add(0, form, hides_end=hides_end)
        for _ in range(6):
            before = ahead.allowed(0)
            drafts, found = [], list[tuple[RowState, list[int]]]()
            for _ in range(4):
                allowed = plain.allowed(0) if plain.state(0) is RowState.HELD else INDEXES[name].tokenize_str("ab")
                if plain.state(0) is RowState.COMPLETE or not allowed or allowed == list(ends):
                    break
                drafts.append(rng.choice([each for each in allowed if each not in ends]))
                plain.append(0, drafts[-1])
                found.append((plain.state(0), plain.allowed(0)))
            assert ahead.update(LookAhead(0, drafts)) == {}
            assert ahead.allowed(0) == before, "the output itself goes nowhere"
            for row, (state, allowed) in enumerate(found, 1):
                assert ahead.state(row) is state
                assert state is not RowState.HELD or ahead.allowed(row) == allowed
            for token_id in drafts:
                ahead.append(0, token_id)
            if not drafts:
                break


def test_there_are_no_masks_behind_a_draft_that_may_not_come() -> None:
    """And none is waited for: a matcher that takes in a wrong token would be built anew."""
    tokenizer = TOKENIZERS["bytes"]
    a, b, x = (tokenizer.convert_tokens_to_ids(char) for char in "abx")
    rows = Rows(INDEXES["bytes"], 5)
    rows.add(0, StructuredOutputs(regex="(ab){9}"))
    rows.update(LookAhead(0, [a, b, x, a]))
    assert rows.allowed(1) == [b]
    assert rows.allowed(2) == [a]
    assert [rows.state(row) for row in (3, 4)] == [RowState.FAILED] * 2
    assert (rows.state(0), rows.allowed(0)) == (RowState.HELD, [a])
    rows.update(RemoveRow(0), LookAhead(0, [a]))
    assert rows.state(1) is RowState.FAILED
