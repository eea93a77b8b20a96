"""Compiling apart from everything: hostile grammars end as their own error, and nobody waits behind them."""

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
from sensorium.grammar.compiler import GrammarCompiler
from sensorium.inputs.vocabulary import vocabulary_of
from sensorium.messages import EngineOutput, FinishReason, Vocabulary
from sensorium.structured_outputs import StructuredOutputs
from sensorium.worker import token_masks
from sensorium.worker.token_masks import RowMasks
from tests.grammar.steps import Steps, new_request
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
def compiler() -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(4, DEADLINE_S)
    compiler.use_vocabulary(VOCABULARY)
    compiler.compile(StructuredOutputs(json_object=True)).result(HANG_S)
    yield compiler
    compiler.close()


@pytest.fixture(scope="module")
def patient_compiler() -> Iterator[GrammarCompiler]:
    """For forms that take no longer than they need."""
    compiler = GrammarCompiler(4, HANG_S)
    compiler.use_vocabulary(VOCABULARY)
    yield compiler
    compiler.close()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_its_callers_error_and_soon(compiler: GrammarCompiler, name: str) -> None:
    grammar = StructuredOutputs(**HOSTILE[name])
    future = compiler.compile(grammar)
    quick = compiler.compile(StructuredOutputs(choice=[f"beside {name}"]))
    quick.result(HANG_S)
    with pytest.raises(
        InvalidRequestError, match=rf"^structured_outputs.{grammar.kind}: got .*, expected .*\. \w+ "
    ) as e:
        future.result(HANG_S)
    message = str(e.value)
    assert message.isprintable()
    assert len(message) < 600
    assert compiler._known[grammar].error == e.value.message  # remembered: nothing compiles it again
    with pytest.raises(InvalidRequestError, match="structured_outputs"):
        compiler.compile(grammar).result(HANG_S)


@pytest.mark.parametrize("name", HARMLESS)
def test_what_only_looks_hostile_is_served(patient_compiler: GrammarCompiler, name: str) -> None:
    patient_compiler.compile(StructuredOutputs(**HARMLESS[name])).result(HANG_S)


def test_unsupported_keywords_are_named(compiler: GrammarCompiler) -> None:
    with pytest.raises(InvalidRequestError, match=r'Unimplemented keys: \["contains", "uniqueItems"\]'):
        compiler.compile(StructuredOutputs(**HOSTILE["unknown keywords"])).result(HANG_S)


def test_quick_grammars_do_not_wait_behind_slow_ones(compiler: GrammarCompiler) -> None:
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


def test_what_nobody_waits_for_is_given_up(compiler: GrammarCompiler) -> None:
    waiting = [
        compiler.compile(StructuredOutputs(json={**_json(ENDLESS), "title": f"given up {i}"})) for i in range(40)
    ]
    for each in waiting:
        assert each.cancel()
    begin_s = time.monotonic()
    compiler.compile(StructuredOutputs(choice=["after them"])).result(HANG_S)
    assert time.monotonic() - begin_s < len(waiting) * DEADLINE_S / 4  # that is what all of them would take


def test_too_many_grammars_at_once_are_refused(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_module, "MAX_OPEN", 1)
    slow = compiler.compile(StructuredOutputs(json={**_json(ENDLESS), "title": "the one"}))
    with pytest.raises(OverloadedError, match="got one more to compile while 1 wait"):
        compiler.compile(StructuredOutputs(choice=["the other"])).result(HANG_S)
    slow.cancel()


def test_without_a_tokenizer_or_with_one_of_another_kind_there_are_no_grammars() -> None:
    compiler = GrammarCompiler(1, DEADLINE_S)
    with pytest.raises(UnsupportedFeatureError, match="no tokenizer"):
        compiler.compile(StructuredOutputs(regex="a")).result(HANG_S)
    compiler.use_vocabulary(vocabulary_of(wrapped(wordpiece()), (), 1))
    for _ in range(2):
        with pytest.raises(UnsupportedFeatureError, match="none whose tokens stand for bytes"):
            compiler.compile(StructuredOutputs(regex="a")).result(HANG_S)
    compiler.close()


# --- Masks, as steps see them ---


def allowed(masks: RowMasks | None) -> dict[int, set[int]]:
    assert masks is not None
    bits = np.unpackbits(masks.words.view(np.uint8), axis=1, bitorder="little")
    return {row: set(np.flatnonzero(line).tolist()) for row, line in zip(masks.rows.tolist(), bits, strict=True)}


def ids(text: str) -> set[int]:
    return {one(char) for char in text}


def one(char: str) -> int:
    return int(TOKENIZER.convert_tokens_to_ids(char))


def test_masks_follow_what_is_sampled(compiler: GrammarCompiler) -> None:
    grammar = StructuredOutputs(regex="[ab]c")
    compiler.compile(grammar).result(HANG_S)
    steps = Steps(compiler)
    assert steps.step(["nobody"]) is None
    new = [new_request("a", grammar), new_request("free", None), new_request("b", grammar, ids("b"))]
    assert allowed(steps.step(["free", "a", "b"], new)) == {1: ids("ab"), 2: ids("c")}
    assert steps.step(["free"]) is None
    steps.sampled({"b": one("c"), "a": one("a"), "free": one("z")})
    masks = steps.step(["b", "a"])
    assert allowed(masks) == {1: ids("c")}
    assert masks is not None
    assert masks.complete_rows == {0}
    assert allowed(steps.step(["b"], [new_request("b", grammar)], freed=["free", "b"])) == {0: ids("ab")}
    assert steps.step([], freed=["a", "b"]) is None
    steps.reader.close()


def test_what_failed_in_a_row_is_no_failure_of_its_next_output(compiler: GrammarCompiler) -> None:
    """An answer about the last output of a row may come when the row has another one already."""
    grammar = StructuredOutputs(regex="[ab]c")
    compiler.compile(grammar).result(HANG_S)
    steps = Steps(compiler, num_rows=1)
    steps.step(["a"], [new_request("a", grammar)])
    steps.sampled({"a": one("z")})  # which the grammar doesn't allow
    masks = steps.step(["b"], [new_request("b", grammar)], freed=["a"])
    assert masks is not None
    assert masks.failures == {}
    assert allowed(masks) == {0: ids("ab")}
    steps.sampled({"b": one("z")})
    masks = steps.step(["b"])
    assert masks is not None
    assert "the output can't go on" in masks.failures[0].message
    steps.reader.close()


def test_a_request_that_ended_tells_nothing_more(compiler: GrammarCompiler) -> None:
    """Its last token would be told of a row that may be another's by then."""
    grammar = StructuredOutputs(regex="[ab]c")
    compiler.compile(grammar).result(HANG_S)
    steps = Steps(compiler, num_rows=1)
    steps.step(["a"], [new_request("a", grammar)])
    steps.requests.append([EngineOutput("a", [one("z")], finish_reason=FinishReason.STOP)])
    assert allowed(steps.step(["a"])) == {0: ids("ab")}
    steps.reader.close()


def test_nobody_has_to_read_what_is_done(compiler: GrammarCompiler) -> None:
    """Requests that end before anything is sampled for them used to leave answers unread, which fill a pipe one day:
    then the mask server would wait for a reader, and the engine for the mask server."""
    grammar = StructuredOutputs(regex="[ab]c")
    compiler.compile(grammar).result(HANG_S)
    steps = Steps(compiler, num_rows=2)
    steps.step([], [new_request("0", grammar)])
    for i in range(1, 8000):
        steps.step([], [new_request(str(i), grammar)], freed=[str(i - 1)])
    assert allowed(steps.step(["7999"])) == {0: ids("ab")}
    steps.reader.close()


def test_outputs_end_and_others_start_when_the_processes_die() -> None:
    compiler = GrammarCompiler(4, DEADLINE_S)
    compiler.use_vocabulary(VOCABULARY)
    grammar = StructuredOutputs(regex="[ab]c")
    compiler.compile(grammar).result(HANG_S)
    steps = Steps(compiler)
    assert allowed(steps.step(["a"], [new_request("a", grammar)])) == {0: ids("ab")}
    assert compiler.service is not None
    for pid in _children(compiler.service._process.pid):
        os.kill(pid, signal.SIGKILL)
    steps.sampled({"a": one("a")})
    masks = steps.step(["a"])
    assert masks is not None
    assert masks.failures[0].status == 500
    _compiled_anew(compiler, grammar)
    masks = steps.step(["b", "a"], [new_request("b", grammar)])
    assert allowed(masks) == {0: ids("ab")}
    assert masks is not None
    assert masks.failures[1].status == 500
    steps.reader.close()
    compiler.close()


def test_a_mask_server_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_masks, "MASK_TIMEOUT_S", 0.2)
    compiler = GrammarCompiler(4, DEADLINE_S)
    compiler.use_vocabulary(VOCABULARY)
    grammar = StructuredOutputs(regex="[ab]c")
    compiler.compile(grammar).result(HANG_S)
    assert compiler.service is not None
    process = compiler.service._process
    stopped = _children(process.pid)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    steps = Steps(compiler)
    masks = steps.step(["a"], [new_request("a", grammar)])
    assert masks is not None
    assert masks.failures[0].status == 500
    monkeypatch.setattr(token_masks, "MASK_TIMEOUT_S", HANG_S)
    _compiled_anew(compiler, grammar)
    assert allowed(steps.step(["b"], [new_request("b", grammar)], freed=["a"])) == {0: ids("ab")}
    steps.reader.close()
    compiler.close()
    until(lambda: not any(psutil.pid_exists(pid) for pid in stopped))


def test_who_waits_for_a_grammar_learns_that_the_processes_died() -> None:
    compiler = GrammarCompiler(4, 60.0)
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
    compiler = GrammarCompiler(4, 60.0)
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


def _json(grammar: StructuredOutputs) -> dict[str, Any]:
    import json

    assert isinstance(grammar.json, str)
    return dict(json.loads(grammar.json))


def _compiled_anew(compiler: GrammarCompiler, grammar: StructuredOutputs) -> None:
    """What comes while the end of the old processes is being noticed may fail with them."""
    until(lambda: compiler.compile(grammar).exception(HANG_S) is None)


def _children(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children()]
