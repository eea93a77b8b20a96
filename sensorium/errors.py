"""The exception tree: every error that a user can meet, with its HTTP status and its code.

Owns no state; importable from every room. Each class also derives from the builtin exception that callers of the
extension API catch, so `except ValueError` written for another engine keeps working.

    SensoriumError                     500
    ├── ConfigError                    500   (ValueError)    a setting is wrong; raised at load
    ├── ModelError                     500   (TypeError)     a model class can't be served as written
    │   ├── DummyDataError             500   (AssertionError) its dummy data is not the worst legal input
    │   └── ModelLookupError           500   (KeyError)      something that was never registered
    ├── WeightsError                   500   (ValueError)    checkpoint and model don't match
    │   └── WeightShapeError           500   (AssertionError) one tensor doesn't fit its parameter
    ├── EngineDeadError                503   (RuntimeError)  the engine core is gone
    │   └── EngineRestartingError      503   (RuntimeError)  a new one is loading; try again later
    ├── RequestAbortedError            499   (RuntimeError)  the caller or a shutdown ended the request
    └── RequestError                   400   one request is at fault; others never notice
        ├── InvalidRequestError        400   (ValueError)    a value is out of bounds
        │   └── ContextLengthError     400                   a prompt doesn't fit into the model's context
        ├── InvalidTypeError           400   (TypeError)     an argument has the wrong type
        ├── UnknownModalityError       400   (NotImplementedError)
        ├── UnregisteredModalityError  400   (KeyError)
        ├── UnsupportedFeatureError    400   (NotImplementedError)
        ├── ProcessorError             400   (RuntimeError)  the model's processor or mapper failed on this input
        │   └── MissingLibraryError    500                   it needs a library that isn't there
        ├── MediaError                 400   (ValueError)    media can't be fetched or decoded
        │   ├── MediaForbiddenError    403
        │   ├── MediaTooLargeError     413
        │   ├── MediaTypeError         415
        │   └── MediaUnavailableError  424
        └── OverloadedError            429   (RuntimeError)  the waiting queue is full; try again later
"""

from __future__ import annotations

import re


class SensoriumError(Exception):
    """Base of all errors that Sensorium raises on purpose.

    Its text is `field: message`, or the message alone. Nobody reads the text to find out what an error is about: that
    is what the attributes are for.

    Args:
        args: the message.
        code: instead of the class's `code`.
        field: see there.
        param: see there.
        reason: see there.
    """

    status: int = 500
    """HTTP status of the answer."""
    code: str = "server_error"
    """What kind of error it is, for programs: OpenAI's word where there is one."""
    field: str | None = None
    """The field of the request that is at fault, with the path into it, such as `messages[0].content`; as the engine
    calls it, until a route that takes it under another name renames it."""
    param: str | None = None
    """What the client is told is at fault, where it isn't a field that the route has."""
    reason: str | None = None
    """What is wrong, in a clause, for those who build a sentence of their own from it."""

    def __init__(
        self,
        *args: object,
        code: str | None = None,
        field: str | None = None,
        param: str | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(*args)
        given = {"code": code, "field": field, "param": param, "reason": reason}
        self.__dict__.update({name: value for name, value in given.items() if value is not None})

    def __str__(self) -> str:
        return self.message if self.field is None else f"{self.field}: {self.message}"

    @property
    def message(self) -> str:
        """The text without the field."""
        return str(self.args[0]) if self.args else ""

    def is_about(self, name: str) -> bool:
        """Whether a field, or something in it, is at fault."""
        return self.field is not None and root_of(self.field) == name


class ConfigError(SensoriumError, ValueError):
    """A setting, alone or with others, can't be used."""


class ModelError(SensoriumError, TypeError):
    """A model class lacks something, or has something, that keeps it from being served."""


class DummyDataError(ModelError, AssertionError):
    """What a dummy-data factory made is smaller than the largest legal input."""


class ModelLookupError(ModelError, KeyError):
    """A name or a model that is not registered."""


class WeightsError(SensoriumError, ValueError):
    """A checkpoint's tensors and a model's parameters don't match."""


class WeightShapeError(WeightsError, AssertionError):
    """A tensor of the checkpoint has another shape than the parameter of its name."""


class EngineDeadError(SensoriumError, RuntimeError):
    """The engine core has ended; no request can be served any more."""

    status = 503
    code = "service_unavailable"


class EngineRestartingError(EngineDeadError):
    """The engine core has ended, and a new one is loading. `retry_after_s`: when to try again."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class LostRankError(EngineDeadError):
    """Of several ranks that share a model, one has ended or doesn't answer. The others can't go on."""


class RequestAbortedError(SensoriumError, RuntimeError):
    """The request was ended before it finished, by its caller or by a shutdown."""

    status = 499
    code = "request_aborted"


class RequestError(SensoriumError):
    """Something about one request is wrong. The message goes to that caller as it stands."""

    status = 400
    code = "invalid_request"


class InvalidRequestError(RequestError, ValueError):
    """A value of a request is outside its bounds."""

    code = "invalid_value"


class ContextLengthError(InvalidRequestError):
    """A prompt, or a prompt and the answer asked for, has more tokens than the model's context or memory holds."""

    code = "context_length_exceeded"

    @classmethod
    def of_prompt(
        cls, got: str, max_tokens: int, max_model_len: int, advice: str = "Shorten the prompt"
    ) -> ContextLengthError:
        """The error for a prompt that doesn't fit. `got`: the number of tokens, in words.

        Clients tell such an error by the words "This model's maximum context length is" or "prompt is too long", if
        not by its code.
        """
        return cls(
            f"the prompt is too long to fit into the model: got {got} tokens, expected at most {max_tokens}. This "
            f"model's maximum context length is {max_model_len} tokens. {advice}, or raise max_model_len."
        )


class InvalidTypeError(RequestError, TypeError):
    """A part of a request has a type that is not accepted."""

    code = "invalid_type"


class UnknownModalityError(RequestError, NotImplementedError):
    """A modality that no plugin is registered for."""

    code = "unsupported_modality"


class UnregisteredModalityError(RequestError, KeyError):
    """A known modality for which the model has no input mapper."""

    code = "unsupported_modality"


class UnsupportedFeatureError(RequestError, NotImplementedError):
    """A feature that exists in the interface but not for this model or build."""

    code = "unsupported_value"


class ProcessorError(RequestError, RuntimeError):
    """The model's input processor, mapper or encoder failed on this request's input."""

    code = "processing_failed"


class MissingLibraryError(ProcessorError):
    """The model's processor needs a library that isn't installed. Found at load, as far as it can be."""

    status = 500


class MediaError(RequestError, ValueError):
    """Media can't be fetched or decoded."""

    code = "invalid_media"


class MediaForbiddenError(MediaError):
    """The address, file or scheme is not allowed."""

    status = 403
    code = "media_forbidden"


class MediaTooLargeError(MediaError):
    """Media exceeds a budget of bytes, pixels, frames or seconds."""

    status = 413
    code = "media_too_large"


class MediaTypeError(MediaError):
    """The container or encoding is not one that is decoded here."""

    status = 415
    code = "unsupported_media_type"


class MediaUnavailableError(MediaError):
    """A remote source did not deliver: refused, not found, or too slow."""

    status = 424
    code = "media_unavailable"


class OverloadedError(RequestError, RuntimeError):
    """The bound on waiting work is reached. `retry_after_s`: when to try again."""

    status = 429
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after_s: float = 1.0, field: str | None = None) -> None:
        super().__init__(message, field=field)
        self.retry_after_s = retry_after_s


def root_of(field: str) -> str:
    """The field of a path into it: `messages` of `messages[0].content`."""
    return re.split(r"[.\[]", field, maxsplit=1)[0]


def error_named(name: str, message: str) -> SensoriumError:
    """An error as it was raised in another process. Only the classes above are looked up."""
    found = globals().get(name)
    if not (isinstance(found, type) and issubclass(found, SensoriumError)):
        found = EngineDeadError
    return found(message)
