"""Why a grammar can't be enforced, in terms that its sender knows.

The messages of the library that compiles grammars name options that can't be set here, numbers that it derived from
those that were sent, and its internals. They are translated to what is wrong with the grammar. An unknown message is
passed on, unless it gives advice.
"""

from __future__ import annotations

import re

_MAX_CHARS = 300
_PLACE = re.compile(r"^at \d+\(\d+\): |^failed to compile JSON schema: |^Unsatisfiable schema: |^error: ")
_ADVICE = re.compile(r"\b(enable|disable|increase|consider|option|limits?\.\w+|max_tokens|set_\w+)\b", re.IGNORECASE)
_TOO_MUCH = "it leaves too much open at once"
_TOLD = (
    (
        r"oneOf constraints are not supported",
        (
            "oneOf has options that one value may fit together. Use anyOf, or give each option a required property "
            "with a const of its own"
        ),
    ),
    (
        r"(?:range .* does not contain a multiple of|contains no multiple)",
        "no number within its bounds is a multiple of multipleOf",
    ),
    (r"integer interval .* contains no integer", "no integer lies within its bounds"),
    (r"Failed to generate regex for (?:integer|float) range", "its bounds of numbers are too large or leave nothing"),
    (r"Value for 'multipleOf' has too many digits", "multipleOf has too many digits"),
    (r"Regex is empty", "no string fits its pattern, format and lengths together"),
    (r"Unable to determine if regex is empty", "its pattern, format and lengths together take too long to compile"),
    (r"(?:look-?around)", "a pattern has look-around, such as (?=...) or \\b, which can't be held to"),
    (r"Resource '(?P<name>[^']*)' is not present", "$ref names {name!r:.100}, which is not in the schema"),
    (r"Pointer '(?P<name>[^']*)' does not exist", "$ref names {name!r:.100}, which is not in the schema"),
    (r"circular references with sibling keys", "a $ref comes back to itself, with other keywords beside it"),
    (r"Current row has \d+ items|step_max_items|max_items_in_row|ParserTooComplex|Too many items", _TOO_MUCH),
    (r"lexer|Lexer|fuel|too many states|too many expressions", "it is too large, or " + _TOO_MUCH),
    (r"(?:schema|grammar) too large|max_grammar_size", "it is too large"),
    (r"^NoExtension", "nothing that it describes can follow"),
    (r"^InternalError|panicked", "the compiler of grammars failed on it"),
)
_PATTERNS = tuple((re.compile(pattern), text) for pattern, text in _TOLD)


def told(reason: str) -> str:
    """One line, printable and short."""
    line = _telling_line(reason)
    for pattern, text in _PATTERNS:
        if (found := pattern.search(line)) is not None:
            return _short(text.format(**{key: value for key, value in found.groupdict().items() if value is not None}))
    return "it can't be compiled" if _ADVICE.search(line) else _short(line)


def _telling_line(reason: str) -> str:
    """The line that says what is wrong, or the first that says something, without where in the grammar it was found."""
    lines = [line.strip() for line in reason.splitlines()]
    telling = [line for line in lines if line and line != "<non-verbose/>"] or ["no reason given"]
    line = next((line for line in telling if line.startswith("error: ")), telling[0])
    while (shorter := _PLACE.sub("", line)) != line:
        line = shorter
    return line


def _short(text: str) -> str:
    shown = "".join(char if char.isprintable() else " " for char in text)
    return shown if len(shown) <= _MAX_CHARS else shown[:_MAX_CHARS] + "..."
