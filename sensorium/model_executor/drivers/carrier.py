"""Where media rows enter a decoder: the module in front of which they can be read and written.

Two kinds of carrier:
- a *trunk*: a proper sub-module that holds every `Attention` of the model and takes `inputs_embeds`;
- the *first layer* of the decoder's stack, where no trunk is ever called with embeddings that we can find.

A pre-forward hook on the carrier either captures the rows that it is given and stops the pass before any attention
runs, or overwrites some of them.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from sensorium.attention import Attention
from sensorium.model_executor.drivers.base import MediaRows

_EMBEDS = "inputs_embeds"
_IDS = ("input_ids", "tokens", "ids")


class PassCaptured(BaseException):
    """Ends a forward pass at the carrier. Not an `Exception`, so that no model code catches it by accident."""


@dataclass(slots=True, eq=False)
class Captured:
    """What the carrier was given: the rows, and all else but token ids by its argument's name."""

    rows: torch.Tensor
    others: dict[str, Any]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those of the others that are tensors."""
        return {name: value for name, value in self.others.items() if isinstance(value, torch.Tensor)}


class Carrier:
    """Reads or writes the rows in front of one module. Idle, it costs one attribute check per call."""

    def __init__(self, module: nn.Module, name: str, kind: str) -> None:
        self.module = module
        self.name = name
        self.kind = kind
        self._signature = inspect.signature(module.forward)
        self._inject: MediaRows | None = None
        self._capturing = False
        self._captured: Captured | None = None
        self._handle = module.register_forward_pre_hook(self._hook, with_kwargs=True)

    def remove(self) -> None:
        """Take the hook off."""
        self._handle.remove()

    def capture(self, run: Callable[[], Any]) -> Captured | None:
        """What the carrier gets when `run` runs a forward pass; None if the pass never reaches it with rows."""
        self._capturing, self._captured = True, None
        try:
            run()
        except PassCaptured:
            pass
        finally:
            self._capturing = False
        captured, self._captured = self._captured, None
        return captured

    @contextlib.contextmanager
    def injecting(self, media: MediaRows | None) -> Iterator[None]:
        """While active, rows `media.index` of what the carrier gets are replaced by `media.rows`."""
        self._inject = media
        try:
            yield
        finally:
            self._inject = None

    def _hook(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._inject is None and not self._capturing:
            return None
        bound = self._signature.bind(*args, **kwargs)
        name = self._rows_argument(bound.arguments)
        if name is None:
            return None
        rows = bound.arguments.get(name)
        if rows is None:
            rows = self._embed(bound.arguments)
        if self._capturing:
            self._captured = Captured(_two_dimensional(rows).clone(), self._others(bound.arguments, name))
            raise PassCaptured
        assert self._inject is not None
        flat = _two_dimensional(rows)
        written = flat.index_copy(0, self._inject.index, self._inject.rows.to(flat.dtype))
        bound.arguments[name] = written.reshape(rows.shape)
        return bound.args, bound.kwargs

    def _others(self, arguments: dict[str, Any], rows_name: str) -> dict[str, Any]:
        """All arguments but rows and ids, those that a `**kwargs` takes included."""
        found: dict[str, Any] = {}
        for key, value in arguments.items():
            is_rest = self._signature.parameters[key].kind is inspect.Parameter.VAR_KEYWORD
            found |= value if is_rest else {key: value}
        return {key: value for key, value in found.items() if key != rows_name and key not in _IDS}

    def _rows_argument(self, arguments: dict[str, Any]) -> str | None:
        """The argument that holds the rows: `inputs_embeds`, or a layer's first floating-point tensor."""
        if self.kind == "trunk":
            return _EMBEDS
        for key, value in arguments.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() >= 2:
                return key
        return None

    def _embed(self, arguments: dict[str, Any]) -> torch.Tensor:
        """Rows of a trunk that was called with ids: embed them in its place, and take the ids away."""
        ids_name = next((name for name in _IDS if isinstance(arguments.get(name), torch.Tensor)), None)
        embed = text_embedding(self.module)
        if ids_name is None or embed is None:
            raise NotImplementedError(f"{self.name} was called without {_EMBEDS}, and its ids can't be embedded")
        ids = arguments[ids_name]
        arguments[ids_name] = None
        return embed(ids)


def _two_dimensional(rows: torch.Tensor) -> torch.Tensor:
    """`(num_tokens, hidden_size)` of rows that may have a batch axis of 1."""
    if rows.dim() == 3 and rows.shape[0] == 1:
        return rows[0]
    if rows.dim() != 2:
        raise NotImplementedError(f"decoder rows of shape {tuple(rows.shape)}")
    return rows


TextEmbedding = Callable[[torch.Tensor], torch.Tensor]


def text_embedding(module: nn.Module) -> TextEmbedding | None:
    """How a trunk embeds ids: its method by one of the usual names, or its embedding module."""
    for name in ("embed_input_ids", "get_input_embeddings"):
        method = getattr(module, name, None)
        if method is None:
            continue
        required = [p for p in inspect.signature(method).parameters.values() if p.default is p.empty]
        required = [p for p in required if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if len(required) == 1:
            return cast(TextEmbedding, method)
        if not required:  # Hugging Face's form returns the embedding module
            return cast(TextEmbedding, method())
    embedding = getattr(module, "embed_tokens", None)
    return embedding if isinstance(embedding, nn.Module) else None


def find_candidates(model: nn.Module) -> list[tuple[nn.Module, str, str]]:
    """`(module, name, kind)` of possible carriers: trunks from the outside in, then the first layer of the stack."""
    attentions = {id(each) for each in model.modules() if isinstance(each, Attention)}

    def holds_all(module: nn.Module) -> bool:
        return attentions <= {id(each) for each in module.modules()}

    candidates = [
        (module, name, "trunk")
        for name, module in model.named_modules()
        if module is not model and _EMBEDS in _parameters(module) and holds_all(module)
    ]
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0 and holds_all(module)
    ]
    if stacks:
        name, stack = stacks[-1]  # the innermost list that holds every layer
        candidates.append((stack[0], f"{name}.0", "first layer"))
    return candidates


def _parameters(module: nn.Module) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return ()
