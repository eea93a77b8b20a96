"""Callables that model authors register: which one serves a class, and which keyword arguments reach it.

Owns the lookup by class and the rule that filters `mm_processor_kwargs`; knows nothing of what the callables
do. Called by the two registries.
"""

from __future__ import annotations

import inspect
from collections import UserDict
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from sensorium.errors import ModelError
from sensorium.logger import get_logger, warn_once

logger = get_logger(__name__)

V = TypeVar("V")
C = TypeVar("C", bound=type)


class ClassRegistry(UserDict[type, V]):
    """A dict keyed by class, in which a class without an entry of its own has that of its nearest base.

    `registry[cls]`, `registry.get(cls)` and `cls in registry` walk the method resolution order;
    `has_own(cls)` looks at the exact class only.
    """

    def __getitem__(self, key: type) -> V:
        for base in key.__mro__:
            if base in self.data:
                return self.data[base]
        raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, type) and any(base in self.data for base in key.__mro__)

    def has_own(self, key: type) -> bool:
        """Whether something was registered for exactly this class."""
        return key in self.data

    def decorator(self, value: V, what: str) -> Callable[[C], C]:
        """A class decorator that stores `value` under the class and returns the class.

        A second registration for the same class wins, with a warning that names `what`.
        """

        def register(model_class: C) -> C:
            if self.has_own(model_class):
                name = model_class.__name__
                logger.warning("Model class %s already has %s. It is overwritten by the new one.", name, what)
            self.data[model_class] = value
            return model_class

        return register


def check_callable(function: object, decorator: str) -> None:
    """Refuse what can't be called with a context, above all a class: the sign of a decorator without
    parentheses.

    Raises `ModelError` (a `TypeError`).
    """
    if isinstance(function, type):
        raise ModelError(
            f"{decorator}: got the class {function.__name__}, expected a function. "
            f"Put parentheses behind the decorator: @...{decorator}(...)."
        )
    if not callable(function):
        raise ModelError(f"{decorator}: got {function!r}, expected a function. Pass a callable.")


def resolve_mm_processor_kwargs(
    init_kwargs: Mapping[str, Any] | None,
    request_kwargs: Mapping[str, Any] | None,
    function: Callable[..., Any],
    *,
    allow_var_kwargs: bool = False,
) -> dict[str, Any]:
    """The keyword arguments with which a registered callable is called.

    There are two sources: the engine option `mm_processor_kwargs` (`init_kwargs`) and the prompt's field of
    that name (`request_kwargs`). Each is filtered against the callable's signature; then the request's win
    over the engine's, and a name in neither is left to the callable's own default.

    A name passes if it is a keyword-only parameter of the callable. Others are dropped with a warning, never
    an error, because one set is offered to the callables of all modalities. `functools.partial` counts a
    bound keyword, and every parameter behind it, as keyword-only. With `allow_var_kwargs` a `**kwargs` takes
    every name that is no positional parameter: so it is with the built-in mappers, which hand all to a
    Hugging Face processor that picks.

    For example, with `f(ctx, data, *, num_crops=4)`, engine `{"num_crops": 8, "ctx": 0}` and request
    `{"num_crops": 16}`, the call is `f(ctx, data, num_crops=16)`.
    """
    init_kwargs = init_kwargs or {}
    request_kwargs = request_kwargs or {}
    resolved, dropped = _split(function, init_kwargs, allow_var_kwargs)
    for name in dropped:  # the same at every call: say it once
        warn_once(logger, _dropped_message(name, function))
    overrides, dropped = _split(function, request_kwargs, allow_var_kwargs)
    for name in dropped:
        logger.warning(_dropped_message(name, function))
    return {**resolved, **overrides}


def accepted_kwargs(function: Callable[..., Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `kwargs` that a call to a Hugging Face processor takes: every name it has, or all with
    `**kwargs`.
    """
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(kwargs)
    named = {name for name, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    return {name: value for name, value in kwargs.items() if name in named}


def _split(
    function: Callable[..., Any], kwargs: Mapping[str, Any], allow_var_kwargs: bool
) -> tuple[dict[str, Any], list[str]]:
    """`kwargs` that pass, and the other names."""
    if not kwargs:
        return {}, []
    kinds = {name: p.kind for name, p in inspect.signature(function).parameters.items()}
    takes_any = allow_var_kwargs and inspect.Parameter.VAR_KEYWORD in kinds.values()
    fallback = inspect.Parameter.KEYWORD_ONLY if takes_any else None
    passing = {n: value for n, value in kwargs.items() if kinds.get(n, fallback) is inspect.Parameter.KEYWORD_ONLY}
    return passing, [name for name in kwargs if name not in passing]


def _dropped_message(name: str, function: Callable[..., Any]) -> str:
    label = getattr(function, "__qualname__", type(function).__name__)
    return (
        f"mm_processor_kwargs: {name!r} is not a keyword-only parameter of {label}, so it is ignored there. "
        f"To accept it, declare it behind a '*' in the parameter list."
    )
