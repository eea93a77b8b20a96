"""The functions that transformers calls for attention and masks if a config names `NAME`.

They find their step through a context variable, since many models don't pass keywords on. Outside of a step they do
what transformers' SDPA does, so that a tower that shares its decoder's config works as before.

Source: `transformers` `AttentionInterface` and `AttentionMaskInterface`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import nn

NAME = "sensorium_paged"
EAGER = "eager"
"""The name of transformers' plain attention."""
IMPLEMENTATION = "_attn_implementation_internal"
"""Where a config keeps the name of the attention function. The setter would write to the configs of other parts too."""

MaskFunction = Callable[..., torch.Tensor]
"""From indices `(batch, head, query, key)` to whether the query sees the key; broadcasts."""


class RuledMask(torch.Tensor):
    """A mask as a function of indices. Models treat it as a 4-D tensor, which they pass to their layers unchanged."""

    rule: MaskFunction
    # Operations on it return plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # noqa: SLF001  as torch's docs have it

    @staticmethod
    def of(rule: MaskFunction, num_queries: int, num_keys: int, device: torch.device | str) -> RuledMask:
        """A mask that follows a rule. It has the shape that models may check, and the memory of one element."""
        one = torch.empty(1, 1, 1, 1, dtype=torch.bool, device=device)
        mask = one.expand(1, 1, num_queries, num_keys).as_subclass(RuledMask)
        mask.rule = rule
        return mask


class PassEnded(BaseException):
    """Ends a pass at load. Not an `Exception`, so that no model code catches it by accident."""


class AttentionStep(Protocol):
    """Handles the attention calls of a pass."""

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        options: Mapping[str, Any],
    ) -> torch.Tensor:
        """`(1, heads, num_tokens, size)` each; returns `(1, num_tokens, heads, value size)`."""


_step: ContextVar[AttentionStep | None] = ContextVar("transformers_attention_step", default=None)


@contextmanager
def attending(step: AttentionStep) -> Iterator[None]:
    """While active, attention calls of this thread go to `step`."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def register() -> None:
    """Make `NAME` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # named as transformers does: some models pass it by keyword
    **options: Any,
) -> tuple[torch.Tensor, None]:
    step = _step.get()
    if step is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output, None
    return step.attend(module, query, key, value, attention_mask, options), None


def _mask(**arguments: Any) -> torch.Tensor | None:
    if _step.get() is None:
        from transformers.masking_utils import sdpa_mask

        mask: torch.Tensor | None = sdpa_mask(**arguments)
        return mask
    sizes = arguments["q_length"], arguments["kv_length"]
    return RuledMask.of(arguments["mask_function"], *sizes, arguments.get("device") or "cpu")
