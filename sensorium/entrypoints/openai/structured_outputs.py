"""How bodies ask for structured outputs: OpenAI's way, vLLM's, and vLLM's older one.

Errors name the fields of `StructuredOutputs`, which few clients send: `StructuredOutputsFields.in_own_terms` renames
them to the fields that the client sent.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field

from sensorium.entrypoints.openai.body import Body
from sensorium.errors import InvalidRequestError, RequestError
from sensorium.structured_outputs import FIELD, StructuredOutputs

_NEXT_STEP = re.compile(r"\b(Change|Simplify|Correct|Set) (?:json|json_object|regex|grammar|choice|one)\.$")


def told_of(error: RequestError, field: str) -> RequestError:
    """An error about structured outputs, with the name of the field that asked for them; other errors unchanged."""
    if not error.is_about(FIELD):
        return error
    last = field.rpartition(".")[2]
    error.args = (_NEXT_STEP.sub(rf"\1 {last}.", error.message),)
    error.field = field
    return error


class JsonSchemaFormat(Body):
    """`response_format.json_schema`."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None
    """Answers are constrained to the schema, whatever this is."""


class ResponseFormat(Body):
    """`response_format`: what the answer is held to."""

    type: str
    json_schema: JsonSchemaFormat | None = None

    def constraint(self) -> StructuredOutputs | None:
        """None for text. Raises `InvalidRequestError` for one that isn't there."""
        if self.json_schema is not None and self.type != "json_schema":
            raise InvalidRequestError(
                f"got a schema with the type {self.type!r:.60}, expected the type 'json_schema'. Change type.",
                field="response_format.json_schema",
            )
        if self.type == "text":
            return None
        if self.type == "json_object":
            return StructuredOutputs(json_object=True)
        if self.type != "json_schema":
            raise InvalidRequestError(
                f"got {self.type!r:.60}, expected 'text', 'json_object' or 'json_schema'. Change it.",
                field="response_format.type",
            )
        if self.json_schema is None or self.json_schema.schema_ is None:
            raise InvalidRequestError(
                "got nothing, expected a JSON schema. Add it.", field="response_format.json_schema.schema"
            )
        return StructuredOutputs(json=self.json_schema.schema_)


class StructuredOutputsBody(Body):
    """`structured_outputs`: one of these."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    start_after: str | None = None

    def constraint(self) -> StructuredOutputs:
        """Raises `InvalidRequestError` unless exactly one is given."""
        return StructuredOutputs(
            json=self.json_,
            json_object=bool(self.json_object),
            regex=self.regex,
            choice=self.choice or (),
            grammar=self.grammar,
            start_after=self.start_after,
        )


_GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")


class StructuredOutputsFields(Body):
    """The fields of a body that constrain the answer."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputsBody | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    def constraint(self) -> StructuredOutputs | None:
        """The constraint on the answer; None if there is none. Raises `InvalidRequestError`, also for several."""
        try:
            return self._constraint()
        except RequestError as error:
            raise self.in_own_terms(error) from None

    def constraint_field(self) -> str | None:
        """The field that asks for it; None where it is `structured_outputs`, whose errors are of its fields."""
        if self.structured_outputs is not None:
            return None
        if self.response_format is not None and self.response_format.type != "text":
            return "response_format.json_schema.schema" if self.response_format.json_schema else "response_format"
        return next((name for name in _GUIDED if getattr(self, name) is not None), None)

    def in_own_terms(self, error: RequestError) -> RequestError:
        """An error about it, with the name of the field that was sent."""
        field = self.constraint_field()
        return error if field is None else told_of(error, field)

    def _constraint(self) -> StructuredOutputs | None:
        given = [name for name in StructuredOutputsFields.model_fields if getattr(self, name) is not None]
        if given == ["response_format"]:
            assert self.response_format is not None
            return self.response_format.constraint()
        if "response_format" in given and self.response_format is not None and self.response_format.type == "text":
            given.remove("response_format")
        if len(given) > 1:
            raise InvalidRequestError(f"got {given[1]} too, expected one of them. Remove one of them.", field=given[0])
        if self.structured_outputs is not None:
            return self.structured_outputs.constraint()
        if given:
            return StructuredOutputs(**{given[0].removeprefix("guided_"): getattr(self, given[0])})
        return None
