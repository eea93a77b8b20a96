"""One error path for all routes: a status, and one sentence of our own in OpenAI's form.

Nothing that another library wrote goes out: neither its texts nor addresses, paths or stacks in them.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from sensorium.entrypoints.openai.records import note_failure
from sensorium.errors import EngineRestartingError, InvalidRequestError, OverloadedError, SensoriumError
from sensorium.logger import get_logger

logger = get_logger(__name__)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    429: "rate_limit_error",
}
_EXPECTED = {
    "bool": "true or false",
    "dict": "an object",
    "finite_number": "a finite number",
    "float": "a number",
    "int": "an integer",
    "list": "a list",
    "string": "a string",
    "model": "an object",
    "missing": "a value",
}
_MAX_RETRY_S = 60
_MAX_PLACE_CHARS = 200
"""A client may have made a name up."""


class HttpError(SensoriumError):
    """An error that only exists over HTTP, such as a route that isn't there."""

    def __init__(self, status: int, message: str, *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})


def error_body(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    """The error as OpenAI's clients expect it."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def error_response(error: BaseException) -> JSONResponse:
    """The answer to a request that failed."""
    note_failure(error)
    if not isinstance(error, SensoriumError):
        logger.error("a request failed", exc_info=error)
        return JSONResponse(error_body("internal error: the request could not be served.", 500), 500)
    headers = dict(error.headers) if isinstance(error, HttpError) else {}
    if isinstance(error, OverloadedError | EngineRestartingError):
        headers["Retry-After"] = str(min(max(round(error.retry_after_s), 1), _MAX_RETRY_S))
    elif error.status == 503:
        headers.setdefault("Retry-After", "5")
    return JSONResponse(error_body(str(error), error.status), error.status, headers)


def forget_frames(error: BaseException) -> None:
    """Let go of what the frames hold that an error passed through: it may be a request's media, and frames and error
    may hold each other until the garbage collector comes by.
    """
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        traceback.clear_frames(found.__traceback__)
        found = found.__cause__ or found.__context__


def invalid_body(error: ValidationError) -> InvalidRequestError:
    """What is wrong with a body, from the first of the findings: the field, and what it should be."""
    found = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in found["loc"] if isinstance(part, int) or part.islower()) or "the body"
    where = where[:_MAX_PLACE_CHARS]
    kind = found["type"]
    if kind == "extra_forbidden":
        return InvalidRequestError(
            f"{where}: got a field that this server doesn't implement, expected one that it does. Remove {where}."
        )
    if kind == "missing":
        return InvalidRequestError(f"{where}: got nothing, expected a value. Add {where}.")
    stem = kind.removesuffix("_type").removesuffix("_parsing")
    expected = _EXPECTED.get(stem, "a valid value")
    return InvalidRequestError(
        f"{where}: got a value of type {type(found['input']).__name__}, expected {expected}. Change {where}."
    )
