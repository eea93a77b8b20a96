"""How bodies ask for answers of a form: OpenAI's way, vLLM's, and vLLM's older one."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from sensorium.entrypoints.openai.body import Body
from sensorium.errors import InvalidRequestError
from sensorium.structured_outputs import StructuredOutputs


class JsonSchemaFormat(Body):
    """`response_format.json_schema`."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None
    """Answers are held to the schema, whatever this says."""


class ResponseFormat(Body):
    """`response_format`: the form of the answer."""

    type: str
    json_schema: JsonSchemaFormat | None = None

    def form(self) -> StructuredOutputs | None:
        """None for text. Raises `InvalidRequestError` for a form that isn't there."""
        if self.json_schema is not None and self.type != "json_schema":
            raise InvalidRequestError(
                f"response_format.json_schema: got a schema with the type {self.type!r:.60}, expected the type "
                "'json_schema'. Change type."
            )
        if self.type == "text":
            return None
        if self.type == "json_object":
            return StructuredOutputs(json_object=True)
        if self.type != "json_schema":
            raise InvalidRequestError(
                f"response_format.type: got {self.type!r:.60}, expected 'text', 'json_object' or 'json_schema'. "
                "Change it."
            )
        if self.json_schema is None or self.json_schema.schema_ is None:
            raise InvalidRequestError(
                "response_format.json_schema.schema: got nothing, expected a JSON schema. Add it."
            )
        return StructuredOutputs(json=self.json_schema.schema_)


class FormBody(Body):
    """`structured_outputs`: one of these."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    start_after: str | None = None

    def form(self) -> StructuredOutputs:
        """Raises `InvalidRequestError` unless exactly one is given."""
        return StructuredOutputs(
            json=self.json_,
            json_object=bool(self.json_object),
            regex=self.regex,
            choice=self.choice or (),
            grammar=self.grammar,
            start_after=self.start_after,
        )


class FormFields(Body):
    """The fields of a body that say what form the answer has."""

    response_format: ResponseFormat | None = None
    structured_outputs: FormBody | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    def form(self) -> StructuredOutputs | None:
        """The form of the answer; None if it is free. Raises `InvalidRequestError`, also for several."""
        given = [name for name in FormFields.model_fields if getattr(self, name) is not None]
        if given == ["response_format"]:
            assert self.response_format is not None
            return self.response_format.form()
        if "response_format" in given and self.response_format is not None and self.response_format.type == "text":
            given.remove("response_format")
        if len(given) > 1:
            raise InvalidRequestError(f"{given[0]}: got {given[1]} too, expected one form. Remove one of them.")
        if self.structured_outputs is not None:
            return self.structured_outputs.form()
        if given:
            return StructuredOutputs(**{given[0].removeprefix("guided_"): getattr(self, given[0])})
        return None
