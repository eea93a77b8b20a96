"""Compiling apart from everything: hostile forms end as their own error, and nobody waits behind them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import pytest

from sensorium.errors import InvalidRequestError, OverloadedError, SensoriumError, UnsupportedFeatureError
from sensorium.grammar import compiler as compiler_module
from sensorium.grammar.compiler import FormCompiler
from sensorium.grammar.constrained_slots import ConstrainedSlots, RowMasks
from sensorium.inputs.vocabulary import vocabulary_of
from sensorium.messages import Vocabulary
from sensorium.sampling_params import SamplingParams
from sensorium.structured_outputs import StructuredOutputs
from tests.grammar.walks import index_of
from tests.helpers.checkpoints import make_tokenizer
from tests.helpers.tiny_tokenizers import wordpiece, wrapped
from tests.helpers.waiting import HANG_S, until

DEADLINE_S = 4.0

TOKENIZER = make_tokenizer()
VOCABULARY = vocabulary_of(TOKENIZER, (TOKENIZER.eos_token_id,), 400)

ENDLESS = StructuredOutputs(json={"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}b.*"} for i in range(1, 30)]})
"""Its compile time doubles with each pattern."""


def chain(length: int, last: str = '"x"') -> str:
    """A grammar of rules each of which is the next: a recursive compiler overflows its stack."""
    return "start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(length)) + f"\na{length}: {last}"


HOSTILE: dict[str, dict[str, Any]] = {
    "stack overflow": {"grammar": chain(10_000)},
    "time": {"json": ENDLESS.json},
    "memory": {"json": {"type": "integer", "multipleOf": 999_983}},
    "factors": {"json": {"allOf": [{"type": "integer", "multipleOf": p} for p in (9973, 9967, 9949)]}},
    "combinations": {
        "json": {"allOf": [{"anyOf": [{"properties": {f"k{i}{j}": {}}} for j in range(10)]} for i in range(12)]}
    },
    "circle": {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}},
    "remote": {"json": {"$ref": "http://127.0.0.1:1/schema.json"}},
    "file": {"grammar": "%import /etc/passwd\nstart: INT"},
    "look around": {"regex": "(?=a)b"},
    "backreference": {"regex": r"(a)\1"},
    "unbalanced": {"regex": "(a"},
    "unknown rule": {"grammar": "start: nothing"},
    "no start": {"grammar": "begin: /a/"},
    "not a grammar": {"grammar": "\x00\x01 {{"},
    "bad GBNF": {"grammar": "root ::= ("},
    "unknown keywords": {"json": {"type": "array", "uniqueItems": True, "contains": {}}},
    "impossible": {"json": {"allOf": [{"type": "string"}, {"type": "integer"}]}},
}
HARMLESS: dict[str, dict[str, Any]] = {
    "repetition": {"regex": "(ab|cd){1,1000000}"},
    "repeated repetition": {"regex": "((a{1,1000}){1,1000}){1,1000}"},
    "exponential automaton": {"regex": "(a|b)*a(a|b){200}"},
    "long strings": {"json": {"type": "string", "minLength": 1_000_000, "maxLength": 100_000_000}},
    "long lists": {"json": {"type": "array", "minItems": 100_000, "items": {"type": "array", "maxItems": 10**9}}},
    "large enum": {"json": {"enum": [f"value-{i}" for i in range(8000)]}},
    "recursion": {"json": {"$ref": "#/$defs/n", "$defs": {"n": {"properties": {"n": {"$ref": "#/$defs/n"}}}}}},
    "many references": {
        "json": {
            "$ref": "#/$defs/a0",
            "$defs": {f"a{i}": {"properties": {k: {"$ref": f"#/$defs/a{i + 1}"} for k in "xy"}} for i in range(60)}
            | {"a60": {"type": "string"}},
        }
    },
    "unknown format": {"json": {"type": "string", "format": "weird"}},
    "many choices": {"choice": [f"{'prefix ' * 12}{i}" for i in range(1000)]},
}


@pytest.fixture(scope="module")
def compiler() -> Iterator[FormCompiler]:
    compiler = FormCompiler(4, DEADLINE_S)
    compiler.use_vocabulary(VOCABULARY)
    compiler.compile(StructuredOutputs(json_object=True)).result(HANG_S)
    yield compiler
    compiler.close()


@pytest.fixture(scope="module")
def patient_compiler() -> Iterator[FormCompiler]:
    """For forms that take no longer than they need."""
    compiler = FormCompiler(4, HANG_S)
    compiler.use_vocabulary(VOCABULARY)
    yield compiler
    compiler.close()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_form_is_its_callers_error_and_soon(compiler: FormCompiler, name: str) -> None:
    form = StructuredOutputs(**HOSTILE[name])
    future = compiler.compile(form)
    quick = compiler.compile(StructuredOutputs(choice=[f"beside {name}"]))
    quick.result(HANG_S)
    with pytest.raises(InvalidRequestError, match=rf"^structured_outputs.{form.kind}: got .*, expected .*\. \w+ ") as e:
        future.result(HANG_S)
    message = str(e.value)
    assert message.isprintable()
    assert len(message) < 600
    assert compiler._known[form].error == message  # remembered: nothing compiles it again
    with pytest.raises(InvalidRequestError, match="structured_outputs"):
        compiler.compile(form).result(HANG_S)


@pytest.mark.parametrize("name", HARMLESS)
def test_what_only_looks_hostile_is_served(patient_compiler: FormCompiler, name: str) -> None:
    patient_compiler.compile(StructuredOutputs(**HARMLESS[name])).result(HANG_S)


def test_unsupported_keywords_are_named(compiler: FormCompiler) -> None:
    with pytest.raises(InvalidRequestError, match=r'Unimplemented keys: \["contains", "uniqueItems"\]'):
        compiler.compile(StructuredOutputs(**HOSTILE["unknown keywords"])).result(HANG_S)


def test_quick_forms_do_not_wait_behind_slow_ones(compiler: FormCompiler) -> None:
    slow = [
        compiler.compile(
            StructuredOutputs(json={**_json(ENDLESS), "title": f"slow {i}"})
        )  # each of them takes all the time that it may
        for i in range(8)
    ]
    for i in range(5):
        compiler.compile(StructuredOutputs(choice=[f"quick {i}"])).result(HANG_S)
    assert not all(each.done() for each in slow)  # in line behind them, the first would have waited for them all
    for each in slow:
        each.cancel()


def test_what_nobody_waits_for_is_given_up(compiler: FormCompiler) -> None:
    waiting = [
        compiler.compile(StructuredOutputs(json={**_json(ENDLESS), "title": f"given up {i}"})) for i in range(40)
    ]
    for each in waiting:
        assert each.cancel()
    begin_s = time.monotonic()
    compiler.compile(StructuredOutputs(choice=["after them"])).result(HANG_S)
    assert time.monotonic() - begin_s < len(waiting) * DEADLINE_S / 4  # that is what all of them would take


def test_too_many_forms_at_once_are_refused(compiler: FormCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_module, "MAX_OPEN", 1)
    slow = compiler.compile(StructuredOutputs(json={**_json(ENDLESS), "title": "the one"}))
    with pytest.raises(OverloadedError, match="got one more form to compile while 1 wait"):
        compiler.compile(StructuredOutputs(choice=["the other"])).result(HANG_S)
    slow.cancel()


def test_without_a_tokenizer_or_with_one_of_another_kind_there_are_no_forms() -> None:
    compiler = FormCompiler(1, DEADLINE_S)
    with pytest.raises(UnsupportedFeatureError, match="there is no tokenizer"):
        compiler.compile(StructuredOutputs(regex="a")).result(HANG_S)
    compiler.use_vocabulary(vocabulary_of(wrapped(wordpiece()), (), 1))
    for _ in range(2):
        with pytest.raises(UnsupportedFeatureError, match="none whose tokens stand for bytes"):
            compiler.compile(StructuredOutputs(regex="a")).result(HANG_S)
    compiler.close()


# --- Slots, as the worker sees them ---


def params(form: StructuredOutputs) -> SamplingParams:
    return SamplingParams(structured_outputs=form)


def allowed(masks: RowMasks | None) -> dict[int, set[int]]:
    assert masks is not None
    bits = np.unpackbits(masks.words.view(np.uint8), axis=1, bitorder="little")
    return {row: set(np.flatnonzero(line).tolist()) for row, line in zip(masks.rows.tolist(), bits, strict=True)}


def ids(text: str) -> set[int]:
    return {TOKENIZER.convert_tokens_to_ids(char) for char in text}


def test_slots_follow_what_is_sampled(compiler: FormCompiler) -> None:
    form = StructuredOutputs(regex="[ab]c")
    compiler.compile(form).result(HANG_S)
    slots = ConstrainedSlots(compiler)
    assert slots.masks(np.array([0, 1])) is None
    slots.add(1, params(form), ())
    slots.add(2, SamplingParams(), ())
    slots.add(3, params(form), tuple(ids("b")))
    assert slots.masks(np.array([0, 2])) is None
    assert allowed(slots.masks(np.array([0, 1, 2, 3]))) == {1: ids("ab"), 3: ids("c")}
    slots.append_each(np.array([3, 1]), np.array([*ids("c"), *ids("a")]))
    masks = slots.masks(np.array([3, 1]))
    assert allowed(masks) == {1: ids("c")}
    assert masks is not None
    assert masks.complete_rows == {0}
    slots.remove(3)
    slots.remove(2)
    assert slots.masks(np.array([3])) is None
    slots.add(3, params(form), ())
    assert allowed(slots.masks(np.array([3]))) == {0: ids("ab")}


def test_what_failed_in_a_slot_is_no_failure_of_its_next_output(compiler: FormCompiler) -> None:
    """An answer about the last output of a slot may come when the slot has another one already."""
    form = StructuredOutputs(regex="[ab]c")
    compiler.compile(form).result(HANG_S)
    slots = ConstrainedSlots(compiler)
    slots.add(0, params(form), ())
    slots.masks(np.array([0]))
    slots.append_each(np.array([0]), np.array([*ids("z")]))  # which the form doesn't allow
    slots.flush()
    slots.remove(0)
    slots.add(0, params(form), ())
    masks = slots.masks(np.array([0]))
    assert masks is not None
    assert masks.failures == {}
    assert allowed(masks) == {0: ids("ab")}
    slots.append_each(np.array([0]), np.array([*ids("z")]))
    masks = slots.masks(np.array([0]))
    assert masks is not None
    assert "the output can't go on" in masks.failures[0].message


def test_outputs_end_and_others_start_when_the_processes_die() -> None:
    compiler = FormCompiler(4, DEADLINE_S)
    compiler.use_vocabulary(VOCABULARY)
    form = StructuredOutputs(regex="[ab]c")
    compiler.compile(form).result(HANG_S)
    slots = ConstrainedSlots(compiler)
    slots.add(0, params(form), ())
    assert allowed(slots.masks(np.array([0]))) == {0: ids("ab")}
    assert compiler.service is not None
    for pid in _children(compiler.service._process.pid):
        os.kill(pid, signal.SIGKILL)
    slots.append_each(np.array([0]), np.array([*ids("a")]))
    masks = slots.masks(np.array([0]))
    assert masks is not None
    assert masks.failures[0].status == 500
    slots.remove(0)
    _compiled_anew(compiler, form)
    slots.add(1, params(form), ())
    assert allowed(slots.masks(np.array([1]))) == {0: ids("ab")}
    compiler.close()


def test_who_waits_for_a_form_learns_that_the_processes_died() -> None:
    compiler = FormCompiler(4, 60.0)
    compiler.use_vocabulary(VOCABULARY)
    compiler.compile(StructuredOutputs(regex="a")).result(HANG_S)
    waiting = compiler.compile(ENDLESS)
    assert compiler.service is not None
    compiler.service._process.kill()
    with pytest.raises(SensoriumError, match="Send the request again"):
        waiting.result(HANG_S)
    _compiled_anew(compiler, StructuredOutputs(regex="a"))
    compiler.close()


def test_nothing_is_left_of_the_processes() -> None:
    compiler = FormCompiler(4, 60.0)
    compiler.use_vocabulary(VOCABULARY)
    compiler.compile(StructuredOutputs(regex="a")).result(HANG_S)
    compiler.compile(ENDLESS)
    assert compiler.service is not None
    process = compiler.service._process
    until(lambda: _children(process.pid))
    family = [process.pid, *_children(process.pid)]
    compiler.close()
    assert process.poll() is not None
    until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in family))


def test_a_vocabulary_holds_ids_that_only_the_model_has() -> None:
    vocabulary = vocabulary_of(TOKENIZER, (), 1000)
    assert vocabulary.size == 1000
    assert vocabulary.eos_token_ids == (TOKENIZER.eos_token_id,)
    assert index_of(TOKENIZER, 5).vocab_size == len(TOKENIZER) + 5
    assert isinstance(vocabulary, Vocabulary)


def _json(form: StructuredOutputs) -> dict[str, Any]:
    import json

    assert isinstance(form.json, str)
    return dict(json.loads(form.json))


def _compiled_anew(compiler: FormCompiler, form: StructuredOutputs) -> None:
    """What comes while the end of the old processes is being noticed may fail with them."""
    until(lambda: compiler.compile(form).exception(HANG_S) is None)


def _children(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children()]
