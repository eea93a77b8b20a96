"""What all bodies of requests share.

Bodies are judged to the first mistake and no further: pydantic's own way is to look at everything and make a report of
all that is wrong, which takes seconds and hundreds of megabytes for a list of a hundred thousand wrong elements.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError, model_validator
from pydantic_core import CoreSchema, InitErrorDetails

_COLLECTIONS = frozenset({"list", "dict", "tuple", "set", "frozenset"})


def _fail_fast(schema: Any) -> None:
    """Let the first wrong element end every list and object of a schema."""
    if isinstance(schema, dict):
        kind = schema.get("type")  # a dict of schemas by field may have one of that name
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

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """See pydantic."""
        schema = handler(source)
        _fail_fast(schema)
        return schema

    @model_validator(mode="before")
    @classmethod
    def _refuse_first_unknown(cls, given: Any) -> Any:
        if isinstance(given, dict) and len(given) > len(cls.model_fields):
            known = {field.alias or name for name, field in cls.model_fields.items()}
            name = next(each for each in given if each not in known)
            details = InitErrorDetails(type="extra_forbidden", loc=(name,), input=given[name])
            raise ValidationError.from_exception_data(cls.__name__, [details])
        return given
