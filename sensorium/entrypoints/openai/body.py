"""The base class of request bodies.

Validation stops at the first mistake: pydantic by default reports every mistake, which takes seconds and hundreds of
megabytes for a list of a hundred thousand wrong elements.
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError, model_validator
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError

from sensorium.entrypoints.openai.fields import known_field

_COLLECTIONS = frozenset({"list", "dict", "tuple", "set", "frozenset"})
_names_of_all_routes: set[str] = set()


def _fail_fast(schema: Any) -> None:
    """Make every list and object of a schema stop at its first wrong element."""
    if isinstance(schema, dict):
        kind = schema.get("type")  # a dict of schemas by field may have a field of that name
        is_schema = isinstance(kind, str)
        if is_schema and kind in _COLLECTIONS:
            schema["fail_fast"] = True
        for name, each in schema.items():
            if not (is_schema and name == "metadata"):
                _fail_fast(each)
    elif isinstance(schema, list | tuple):
        for each in schema:
            _fail_fast(each)


class Body(BaseModel):
    """Refuses fields that it doesn't have, and values of another type; a field has at most a few mistakes."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt_field: ClassVar[str | None] = None
    """The field that holds the prompt, for errors."""
    place: ClassVar[str | None] = None
    """The path to it for the table of known fields, such as "text."; "" for a route's whole body."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """See pydantic."""
        schema = handler(source)
        _fail_fast(schema)
        return schema

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """See pydantic."""
        super().__pydantic_init_subclass__(**kwargs)
        if cls.place == "":
            _names_of_all_routes.update(field_names(cls))

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_asks_for_nothing(cls, given: Any) -> Any:
        return asked_for(cls, given, cls.place) if isinstance(given, dict) else given


@cache
def field_names(kind: type[BaseModel]) -> frozenset[str]:
    """The fields of a body, as they are written."""
    return frozenset(field.alias or name for name, field in kind.model_fields.items())


def asked_for(kind: type[BaseModel], given: dict[str, Any], place: str | None) -> dict[str, Any]:
    """Remove the fields that ask for nothing: null in any field of any route, and values that the table takes.

    The first field that is refused ends it: a body may have any number of them. `place`: see `Body`.

    Raises:
        ValidationError: A field is unknown, or is one of the table and asks for something.
    """
    own, asked = field_names(kind), {}
    for name, value in given.items():
        if name in own:
            if value is not None:
                asked[name] = value
        elif place is not None and (known := known_field(f"{place}{name}")) is not None:
            if not known.may_be_left_out(f"{place}{name}", value):
                raise _refused(kind, name, value, PydanticCustomError(UNSUPPORTED, known.expected))
        elif value is not None or place != "" or name not in _names_of_all_routes:
            raise _refused(kind, name, value, "extra_forbidden")
    return asked


UNSUPPORTED = "unsupported"
"""Type of the finding for a field of the table; its text is what was expected."""


def _refused(kind: type[BaseModel], name: str, value: Any, finding: str | PydanticCustomError) -> ValidationError:
    details = InitErrorDetails(type=finding, loc=(name,), input=value)
    return ValidationError.from_exception_data(kind.__name__, [details])
