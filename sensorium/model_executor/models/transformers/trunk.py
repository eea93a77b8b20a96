"""The part of a Hugging Face model before its head. The outer `forward` can run up to its end, or from there on.

Running up to its end gives hidden states without logits of every row. Running from there on, with given rows as the
trunk's output, gives logits of chosen rows as the model itself computes them, scales and caps included.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

_ROWS = 3
"""The number of hidden states for which heads are compared."""


class _Ended(BaseException):
    """Ends a pass after the trunk. Not an `Exception`, so that no model code catches it."""


class Trunk:
    """One module of a model. While unused, it costs one attribute check per call.

    Args:
        model: The whole model.
        module: The trunk.
    """

    def __init__(self, model: Any, module: nn.Module) -> None:
        self._model = model
        self._module = module
        self.forward: Any = module.forward
        """The module's own."""
        self._rows: torch.Tensor | None = None
        self._sample: Any = None
        self._ends = False
        self._ended_with: Any = None
        module.forward = self._stand_in
        self._head: nn.Module | None = None

    def remove(self) -> None:
        """Leave the module as it was."""
        self._module.forward = self.forward

    def run(self, arguments: Mapping[str, Any]) -> Any:
        """What the trunk returns when the model is called with these arguments; None if it isn't called."""
        self._ends, self._ended_with = True, None
        try:
            self._model(**arguments)
        except _Ended:
            pass
        finally:
            self._ends = False
        output, self._ended_with = self._ended_with, None
        self._sample = output
        return output

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits `(num_rows, vocab_size)` of hidden states."""
        if self._head is not None:
            logits: torch.Tensor = self._head(hidden_states)
            return logits
        return self._outer_logits(hidden_states)

    def find_head(self, size: int, device: torch.device, dtype: torch.dtype) -> None:
        """From now on call the output head alone, if the outer `forward` does nothing else after the trunk."""
        head = self._model.get_output_embeddings()
        if not isinstance(head, nn.Module):
            return
        generator = torch.Generator().manual_seed(0)
        rows = 30 * torch.randn(_ROWS, size, generator=generator).to(device, dtype)
        try:
            is_all = torch.equal(head(rows), self._outer_logits(rows))
        except RuntimeError:  # rows of a width that the head doesn't take
            return
        self._head = head if is_all else None

    def behind(self, rows: torch.Tensor, arguments: Mapping[str, Any]) -> Any:
        """What the model returns with `rows` `(batch, num_tokens, hidden_size)` as the trunk's output."""
        self._rows = rows
        try:
            return self._model(**arguments)
        finally:
            self._rows = None

    def _outer_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        ids = torch.zeros(1, len(hidden_states), dtype=torch.long, device=hidden_states.device)
        logits: torch.Tensor = self.behind(hidden_states[None], {"input_ids": ids, "use_cache": False}).logits[0]
        return logits

    def _stand_in(self, *args: Any, **kwargs: Any) -> Any:
        if self._rows is not None:
            return _with_rows(self._module, self._sample, self._rows)
        output = self.forward(*args, **kwargs)
        if self._ends:
            self._ended_with = output
            raise _Ended
        return output


def hidden_states(output: Any) -> torch.Tensor:
    """`(1, num_tokens, hidden_size)` of what a trunk returned."""
    hidden: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return hidden


def _with_rows(module: nn.Module, output: Any, rows: torch.Tensor) -> Any:
    """A module's output with other rows, and with its pooler's output for them if it has one (GTE)."""
    if isinstance(output, torch.Tensor):
        return rows
    if isinstance(output, tuple):
        return (rows, *output[1:])
    output = copy.copy(output)
    output["last_hidden_state"] = rows
    pooler = getattr(module, "pooler", None)
    if isinstance(pooler, nn.Module) and output.get("pooler_output") is not None:
        output["pooler_output"] = pooler(rows)
    return output


def find_trunk(model: Any, arguments: Mapping[str, Any]) -> Trunk | None:
    """A trunk from which the outer `forward` can go on with given hidden states, and returns what it does in a whole
    pass.

    Args:
        model: The whole model.
        arguments: Those of a pass.
    """
    logits: torch.Tensor = model(**arguments).logits[0]
    for module in _candidates(model):
        trunk = Trunk(model, module)
        try:
            output = trunk.run(arguments)
            if output is not None and torch.equal(trunk.logits(hidden_states(output)[0]), logits):
                return trunk
        except Exception:  # noqa: BLE001  it returns something else, or takes other arguments: no trunk
            pass
        trunk.remove()
    return None


def _candidates(model: Any) -> Iterator[nn.Module]:
    """Modules under the names that models have for their inner part, each once."""
    seen: list[nn.Module] = [model]
    for name in ("get_decoder", "base_model"):
        found = getattr(model, name, None)
        module = found() if name == "get_decoder" and callable(found) else found
        if isinstance(module, nn.Module) and all(module is not each for each in seen):
            seen.append(module)
            yield module
