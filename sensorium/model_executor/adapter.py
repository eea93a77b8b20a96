"""Calls a model by its own signature, so that the engine adapts to the class and not the class to the engine.

`construct_model` accepts every form of constructor; `ForwardAdapter` calls `forward` with only what it takes.
Signatures are read once, at load; a call costs one small dict.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from sensorium.errors import ModelError
from sensorium.logger import get_logger
from sensorium.plugins import style_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from sensorium.config import EngineConfig

logger = get_logger(__name__)

Parameters = Mapping[str, inspect.Parameter]

_NAMED_KINDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)

_current_config: ContextVar[EngineConfig | None] = ContextVar("current_engine_config", default=None)


# Constructors


def construct_model(model_class: type, config: EngineConfig, prefix: str = "") -> nn.Module:
    """Make an instance of a model class, whichever way its constructor wants to be called.

    The parameters' names decide; see `constructor_kwargs`. What the constructor builds inside may ask
    `current_engine_config`.

    Raises `ModelError` (a `TypeError`) if the constructor requires something that the engine doesn't have.
    """
    if (style := style_of(model_class)) is not None:
        config = style.config_for_constructor(config)
    kwargs = constructor_kwargs(model_class, config, prefix)
    with _set_current_config(config):
        model: nn.Module = model_class(**kwargs)
        return model


def constructor_kwargs(model_class: type, config: EngineConfig, prefix: str = "") -> dict[str, Any]:
    """The keyword arguments for a model class's constructor, found by the names of its parameters.

    =====================  ==========================================================================================
    `vllm_config`          the `EngineConfig`
    `config`               the `EngineConfig` or the Hugging Face config, see below
    `prefix`               the module's name in the checkpoint
    `multimodal_config`    the `MultiModalConfig`; likewise `model_config`, `cache_config`, `scheduler_config`,
                           `parallel_config`, `device_config`, `load_config`, `quant_config`, `lora_config`
    =====================  ==========================================================================================

    `config` is the Hugging Face config if `vllm_config` or any of the last row's names stands beside it (the style of
    older engines), or if its annotation names a class other than `EngineConfig`. Without either sign it is the
    `EngineConfig` if it can only be given by keyword, as in `__init__(self, *, config, prefix="")`, and the Hugging
    Face config otherwise, as in `__init__(self, config)`.

    Raises `ModelError` (a `TypeError`) for a required parameter of another name.
    """
    parameters = _constructor_parameters(model_class)
    parts = _config_parts(config)
    offered = {"vllm_config": config, "prefix": prefix, **parts}
    if "config" in parameters:
        hf_config = config.model_config.hf_config
        takes_engine_config = _config_is_engine_config(parameters, parts)
        offered["config"] = config if takes_engine_config else hf_config
        if not takes_engine_config:
            # No warning: an author whose class doesn't load yet would take it for the reason.
            logger.info(
                "%s: its constructor takes a Hugging Face config. `__init__(self, *, config, prefix='')`, with the "
                "engine's config, is the current form.",
                model_class.__name__,
            )
    required = [name for name, p in parameters.items() if p.default is p.empty and name not in offered]
    if required:
        raise ModelError(
            f"Constructor of {model_class.__name__}: got required parameters {required}, expected none but "
            f"{sorted([*offered, 'config'])}. Give them defaults, or read them from the config."
        )
    return {name: value for name, value in offered.items() if name in parameters}


def current_engine_config() -> EngineConfig:
    """The configuration of the model that is being constructed. Raises `ModelError` outside of a constructor."""
    config = _current_config.get()
    if config is None:
        raise ModelError(
            "Engine configuration: none is current, because no model is being constructed. Pass the configuration on, "
            "or construct the model with sensorium.model_executor.adapter.construct_model."
        )
    return config


def config_in_construction() -> EngineConfig | None:
    """The configuration of the model that is being constructed, if one is."""
    return _current_config.get()


@contextmanager
def _set_current_config(config: EngineConfig) -> Iterator[None]:
    token = _current_config.set(config)
    try:
        yield
    finally:
        _current_config.reset(token)


def _config_parts(config: EngineConfig) -> dict[str, Any]:
    """Parts of the configuration under the names by which constructors of older style take them."""
    return {
        "multimodal_config": config.model_config.multimodal_config,
        "model_config": config.model_config,
        "cache_config": config.cache_config,
        "scheduler_config": config.scheduler_config,
        "parallel_config": config.parallel_config,
        "device_config": config.device_config,
        "load_config": config.load_config,
        "quant_config": config.quant_config,
        "lora_config": config.lora_config,
    }


def _config_is_engine_config(parameters: Parameters, parts: Mapping[str, Any]) -> bool:
    if any(name in parameters for name in ("vllm_config", *parts)):
        return False
    config = parameters["config"]
    annotation = config.annotation
    name = annotation.__name__ if isinstance(annotation, type) else str(annotation).rpartition(".")[2]
    if annotation is config.empty or name in ("Any", "object"):
        return config.kind is config.KEYWORD_ONLY
    return "EngineConfig" in name or "VllmConfig" in name


def _constructor_parameters(model_class: type) -> dict[str, inspect.Parameter]:
    """Parameters by which a class is made, by keyword.

    They are those of `__init__`, or of `__new__` where only that is written out. Behind a `**kwargs`, the next base's
    `__init__` is taken to receive the rest.
    """
    name = "__init__" if _is_written_out(model_class, "__init__") else "__new__"
    parameters: dict[str, inspect.Parameter] = {}
    for base in model_class.__mro__:
        function = vars(base).get(name)
        if function is None or not _is_written_out(base, name):
            continue
        own = list(inspect.signature(getattr(base, name)).parameters.values())[1:]
        parameters |= {p.name: p for p in own if p.kind in _NAMED_KINDS and p.name not in parameters}
        if all(p.kind is not p.VAR_KEYWORD for p in own):
            break
    return parameters


def _is_written_out(cls: type, name: str) -> bool:
    """Whether a class or a base of it, other than torch's and Python's own, defines a method."""
    for base in cls.__mro__:
        if name in vars(base):
            return base.__module__ not in ("builtins", "typing") and not base.__module__.startswith("torch.nn.")
    return False


# Forward

_ENGINE_PARAMETERS = ("input_ids", "positions", "kv_caches", "attn_metadata", "intermediate_tensors", "inputs_embeds")
"""Parameters of `forward` that the engine fills; all others are for media."""


class ForwardAdapter:
    """Calls a model's `forward` with the keywords that it accepts.

    - `input_ids`, `positions`, `kv_caches`, `attn_metadata`, `intermediate_tensors` and `inputs_embeds` are passed only
      where `forward` names them; `intermediate_tensors` is None.
    - Media parameters without a default get None when the step has no media.
    - `**kwargs` gets all media arguments, and nothing else.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        parameters = list(inspect.signature(model.forward).parameters.values())
        named = [p for p in parameters if p.kind in _NAMED_KINDS]
        self._names = frozenset(p.name for p in named)
        self._takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.media_parameters: tuple[str, ...] = tuple(p.name for p in named if p.name not in _ENGINE_PARAMETERS)
        """Names of the parameters for media, in order."""
        engine_only = [p.name for p in named if p.name == "intermediate_tensors"]
        no_default = [p.name for p in named if p.name in self.media_parameters and p.default is p.empty]
        self._absent: dict[str, None] = dict.fromkeys([*engine_only, *no_default])
        self._check_positional_only(parameters)
        self._check_engine_parameters()

    def _check_positional_only(self, parameters: Sequence[inspect.Parameter]) -> None:
        for parameter in parameters:
            if parameter.kind is parameter.POSITIONAL_ONLY:
                raise ModelError(
                    f"forward of {type(self._model).__name__}: got the positional-only parameter {parameter.name!r}, "
                    f"expected parameters that can be given by name. Remove the '/' from its parameter list."
                )

    def _check_engine_parameters(self) -> None:
        """Refuse misspelt names: they would be taken for media, and be None in every step."""
        for name in self._absent:
            meant = difflib.get_close_matches(name, _ENGINE_PARAMETERS, n=1, cutoff=0.85)
            if meant and meant[0] not in self._names:
                raise ModelError(
                    f"forward of {type(self._model).__name__}: got the parameter {name!r}, expected {meant[0]!r}. "
                    f"The engine gives arguments by name; rename it."
                )

    @property
    def takes_any_media(self) -> bool:
        """Whether `forward` has a `**kwargs`, which takes media arguments of every name."""
        return self._takes_any

    def accepts(self, name: str) -> bool:
        """Whether `forward` names a parameter."""
        return name in self._names

    def check_media_parameters(self, names: Collection[str], model_class: type | None = None) -> None:
        """Refuse mapped arguments that `forward` doesn't take; run at load on the mapped dummy data.

        `model_class`: the registered class, whose mappers made the arguments. Raises `ModelError` (a `TypeError`) that
        names the argument and the parameters that exist.
        """
        check_accepted(names, self.media_parameters, self._takes_any, "forward", model_class or type(self._model))

    def __call__(
        self,
        *,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        kv_caches: Any,
        attn_metadata: Any,
        inputs_embeds: torch.Tensor | None = None,
        **media: Any,
    ) -> Any:
        """Run the model; `media` are the mapped arguments of this step, batched.

        Raises `ModelError` (a `TypeError`) if embeddings are given to a `forward` that doesn't take them.
        """
        kwargs: dict[str, Any] = {**self._absent, **media}
        names = self._names
        if "input_ids" in names:
            kwargs["input_ids"] = input_ids
        if "positions" in names:
            kwargs["positions"] = positions
        if "kv_caches" in names:
            kwargs["kv_caches"] = kv_caches
        if "attn_metadata" in names:
            kwargs["attn_metadata"] = attn_metadata
        if "inputs_embeds" in names:
            kwargs["inputs_embeds"] = inputs_embeds
        elif inputs_embeds is not None:
            raise ModelError(
                f"forward of {type(self._model).__name__}: it has no parameter 'inputs_embeds', so it can't be given "
                f"embeddings. Add `inputs_embeds: torch.Tensor | None = None`."
            )
        if not media:
            return self._model(**kwargs)
        from sensorium.model_executor.counted_merges import CountedMerges

        with CountedMerges():
            return self._model(**kwargs)


def check_accepted(
    names: Collection[str], accepted: Collection[str], takes_any: bool, method: str, model_class: type
) -> None:
    """Refuse argument names that a method of a model doesn't take. Raises `ModelError` (a `TypeError`)."""
    unknown = sorted(set(names) - set(accepted))
    if unknown and not takes_any:
        raise ModelError(
            f"Input mapper of {model_class.__name__}: got the keyword arguments {unknown}, expected ones that "
            f"{method} takes: {sorted(accepted)}. Add them as parameters of {method}, or drop them in the mapper."
        )
