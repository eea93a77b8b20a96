"""What JSON Schema says and the library doesn't follow: annotations say nothing, and 2.0 is an integer."""

from __future__ import annotations

import json
from functools import lru_cache

from llguidance import LLMatcher

from sensorium.grammar.schemas.walk import Schema, walk

_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_MAX_FORMATS = 1024
_ANNOTATIONS = (
    *("title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "$comment"),
    *("contentEncoding", "contentMediaType", "contentSchema", "$vocabulary", "$dynamicAnchor", "$recursiveAnchor"),
)
"""Keywords that say nothing about values. An anchor does where a `$dynamicRef` stands, which can't be held to."""


def correct(root: Schema) -> None:
    """Change a schema in place to what the library takes for what it means."""
    for schema in walk(root):
        for name in _ANNOTATIONS:
            schema.pop(name, None)
        if isinstance(schema.get("format"), str) and not _is_known(schema["format"]):
            del schema["format"]
        for name in _COUNTS:
            count = schema.get(name)
            if isinstance(count, float) and count.is_integer():
                schema[name] = int(count)


@lru_cache(maxsize=_MAX_FORMATS)
def _is_known(name: str) -> bool:
    """Whether strings can be held to a format. One that nobody knows is an annotation."""
    grammar = LLMatcher.grammar_from_json_schema(json.dumps({"type": "string", "format": name}))
    return not LLMatcher.validate_grammar(grammar)
