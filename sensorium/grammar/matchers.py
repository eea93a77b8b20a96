"""From a grammar to a compiled matcher, and to what its caller reads if it can't be compiled.

Runs in the grammar processes only: the engine never imports llguidance.
"""

from __future__ import annotations

import json
import re
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from sensorium.errors import InvalidRequestError
from sensorium.grammar.reasons import told
from sensorium.grammar.schemas.big_numbers import OPTIONS
from sensorium.grammar.schemas.ready import with_ready_schemas
from sensorium.structured_outputs import StructuredOutputs

LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,
    step_max_items=50_000,
    max_items_in_row=2_000,
    max_lexer_states=40_000,
    max_grammar_size=500_000,
    verbose_errors=False,
)
"""Bounds on compiling and on single steps. States (1 to 2 kB each) pile up while an output grows; `RowMatcher` starts
anew when they are used up."""

WHITESPACE = r" |\r?\n[ \t]{0,64}"
"""Between the tokens of JSON: nothing, a space, or a new line with its indentation. A model that has lost its way can't
go on with spaces for ever."""

_NO_FORCING = '%llguidance {"no_forcing": true}\n'
"""Without this, where text is certain the library allows no token but the one that its tokenizer would choose there,
which isn't always the one that the model knows: in front of `"kind":` one token for all of it was forbidden."""
_GBNF = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)


def grammar_text(grammar: StructuredOutputs, tokenizer: LLTokenizer) -> str:
    """The grammar in llguidance's form of Lark.

    Raises:
        InvalidRequestError: A GBNF grammar can't be read, or a schema asks for what can't be held to.
    """
    lark = _lark_of(grammar)
    try:
        ready = with_ready_schemas(lark, tokenizer) if "%json" in lark else lark
    except ValueError as error:
        raise refusal(grammar, str(error)) from None
    except RecursionError:
        raise refusal(grammar, "what it refers to is nested too deep") from None
    return str(LLMatcher.grammar_from_lark(_NO_FORCING + ready))


def _lark_of(spec: StructuredOutputs) -> str:
    if spec.json is not None or spec.json_object:
        schema: Any = json.loads(spec.json) if isinstance(spec.json, str) else {"type": "object"}
        own = schema.get(OPTIONS)
        options = {"whitespace_pattern": WHITESPACE, **(own if isinstance(own, dict) else {})}
        return f"start: %json {json.dumps({**schema, OPTIONS: options}, ensure_ascii=False)}"
    if spec.regex is not None:
        text = LLMatcher.grammar_from_regex(spec.regex)
        return str(json.loads(text)["grammars"][0]["lark_grammar"])
    if spec.grammar is not None:
        return _as_lark(spec.grammar)
    return "start: " + " | ".join(map(json.dumps, spec.choice))


def compile_grammar(grammar: StructuredOutputs, tokenizer: LLTokenizer) -> LLMatcher:
    """A matcher at the beginning of an output.

    Raises:
        InvalidRequestError: The grammar means nothing, asks for what can't be held to, or is too large.
    """
    matcher = LLMatcher(tokenizer, grammar_text(grammar, tokenizer), limits=LIMITS, log_level=0)
    if matcher.is_error():
        raise refusal(grammar, matcher.get_error())
    return matcher


def refusal(grammar: StructuredOutputs, reason: str) -> InvalidRequestError:
    """The error for a grammar that can't be compiled; `reason` is the library's."""
    reason = told(reason)
    return InvalidRequestError(
        f"got one that can't be held to ({reason}), expected one that can. Change {grammar.kind}.",
        field=f"structured_outputs.{grammar.kind}",
        reason=reason,
    )


def _as_lark(grammar: str) -> str:
    """A grammar in Lark's notation: as it stands, or from GBNF."""
    if not _GBNF.search(grammar):
        return grammar
    from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

    try:
        return str(any_to_lark(grammar))
    except (GbnfToLarkError, RecursionError, ValueError, IndexError) as error:
        raise InvalidRequestError(
            f"got GBNF that can't be read ({told(str(error))}), expected rules such as root ::= ... . Correct grammar.",
            field="structured_outputs.grammar",
        ) from None
