"""One error path for all routes: a status, and one sentence in OpenAI's format.

No text of another library is sent to clients, because it may hold addresses, paths or stacks.
"""

from __future__ import annotations

import re
import reprlib
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from sensorium.entrypoints.openai.body import UNSUPPORTED
from sensorium.entrypoints.openai.records import current_record, note_failure
from sensorium.errors import (
    ContextLengthError,
    EngineRestartingError,
    InvalidRequestError,
    InvalidTypeError,
    MediaError,
    OverloadedError,
    ProcessorError,
    RequestError,
    SensoriumError,
    UnsupportedFeatureError,
    root_of,
)
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
_CODES = {
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_content_type",
    431: "request_too_large",
    503: "service_unavailable",
}
"""The codes of errors that only exist over HTTP."""
_PROMPT_NAMES = ("prompt", "prompt_token_ids", "text")
"""What the engine calls the prompt, whatever field it came in."""
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
"""Bounds what a client's made-up name adds to a message."""


class HttpError(SensoriumError):
    """An error that only exists over HTTP, such as a route that isn't there."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        headers: Mapping[str, str] | None = None,
        code: str | None = None,
        field: str | None = None,
    ) -> None:
        super().__init__(message, code=code or _CODES.get(status, f"http_{status}"), field=field)
        self.status = status
        self.headers = dict(headers or {})


def error_body(error: BaseException, internal: str = "the request could not be served.") -> dict[str, Any]:
    """The error as OpenAI's clients expect it. `internal`: the message for an error of another class."""
    if not isinstance(error, SensoriumError):
        return _body(f"internal error: {internal}", 500, None, SensoriumError.code)
    return _body(str(error), error.status, error_param(error), error_code(error))


def _body(message: str, status: int, param: str | None, code: str) -> dict[str, Any]:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_code(error: BaseException) -> str:
    """The error's code, for programs."""
    if not isinstance(error, SensoriumError) or (type(error) is RequestError and error.status >= 500):
        return SensoriumError.code
    return error.code


def error_param(error: SensoriumError) -> str | None:
    """The field of the request that is at fault, with the path to it; None where none is."""
    record = current_record()
    if error.param is not None or record is None or not record.field_names:
        return error.param or error.field
    root = None if error.field is None else root_of(error.field)
    if root in record.field_names:
        return error.field
    is_about_prompt = isinstance(error, ContextLengthError | MediaError | ProcessorError) or root in _PROMPT_NAMES
    is_about_prompt |= error.code == ContextLengthError.code  # the core reported it
    return record.prompt_field if is_about_prompt else None


@contextmanager
def as_named(**names: str) -> Iterator[None]:
    """Rename fields in errors raised within to what the client called them. `names`: by the names that the engine has.

    For example, with `max_tokens="max_output_tokens"`, "max_tokens: got 0" becomes "max_output_tokens: got 0".
    """
    try:
        yield
    except RequestError as error:
        words = re.compile("|".join(rf"\b{name}\b" for name in names))
        error.args = (words.sub(lambda found: names[found[0]], error.message),)
        if error.field is not None:
            root = root_of(error.field)
            error.field = names.get(root, root) + error.field.removeprefix(root)
        raise


def error_response(error: BaseException) -> JSONResponse:
    """The answer to a request that failed."""
    note_failure(error)
    if not isinstance(error, SensoriumError):
        logger.error("a request failed", exc_info=error)
        return JSONResponse(error_body(error), 500)
    headers = dict(error.headers) if isinstance(error, HttpError) else {}
    if isinstance(error, OverloadedError | EngineRestartingError):
        headers["Retry-After"] = str(min(max(round(error.retry_after_s), 1), _MAX_RETRY_S))
    elif error.status == 503:
        headers.setdefault("Retry-After", "5")
    return JSONResponse(error_body(error), error.status, headers)


def forget_frames(error: BaseException) -> None:
    """Clear the frames that an error passed through: they may hold a request's media, and frames and error keep each
    other alive until the garbage collector runs.
    """
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        traceback.clear_frames(found.__traceback__)
        found = found.__cause__ or found.__context__


def invalid_body(error: ValidationError, content: object) -> RequestError:
    """The error for a body's first mistake: the field, and what it should be."""
    found, where = _first_finding(error, content)
    kind = found["type"]
    if kind == "extra_forbidden":
        return InvalidRequestError(
            f"got a field that this server doesn't implement, expected one that it does. Remove {where}.",
            code="unknown_parameter",
            param=where,
            field=where,
        )
    if kind == UNSUPPORTED:
        return UnsupportedFeatureError(
            f"got {reprlib.repr(found['input']):.60}, expected {found['msg']}. Remove {where}.",
            code="unsupported_parameter",
            param=where,
            field=where,
        )
    if kind == "missing":
        return InvalidRequestError(
            f"got nothing, expected a value. Add {where}.", code="missing_required_parameter", field=where
        )
    stem = kind.removesuffix("_type").removesuffix("_parsing")
    expected = _EXPECTED.get(stem, "a valid value")
    return InvalidTypeError(
        f"got a value of type {type(found['input']).__name__}, expected {expected}. Change {where}.",
        field=where,
    )


_BODY = "the body"


def _first_finding(error: ValidationError, content: object) -> tuple[Any, str]:
    """The first finding and where it is. Of a field of several types, that of the type which fits furthest."""
    findings = error.errors(include_url=False, include_context=False)
    first = findings[0]
    same_field = [each for each in findings if each["loc"][:1] == first["loc"][:1]]
    paths = [_path(each["loc"], content, is_missing=each["type"] == "missing") for each in same_field]
    furthest = max(
        range(len(paths)), key=lambda i: (len(paths[i]), [step for step in paths[i] if isinstance(step, int)])
    )
    place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in paths[furthest])
    return same_field[furthest], place.removeprefix(".")[:_MAX_PLACE_CHARS] or _BODY


def _path(steps: Sequence[int | str], content: object, *, is_missing: bool) -> list[int | str]:
    """The steps that lead through the body, without pydantic's names for the types of a field."""
    path: list[int | str] = []
    for index, step in enumerate(steps):
        try:
            content = content[step]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            if is_missing and index == len(steps) - 1:
                path.append(step)
            continue
        path.append(step)
    return path
