"""Divides modules of transformers over ranks, by the plans in transformers' configs (`base_model_tp_plan`).

A plan names linear layers whose output channels are divided, and others whose input channels are divided, after which
ranks sum. Attention between them gets fewer heads, and takes their number from its input. Each rank has whole: layers
that a plan doesn't name, layers whose outputs it would gather at once, embeddings, heads and media encoders.

Source: `transformers` `distributed/tensor_parallel.py`, which defines the names of the styles.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sensorium.distributed import Shard, TensorParallel
from sensorium.errors import ConfigError, ModelError
from sensorium.model_executor.layers.linear import shard_of_kv_heads

WHOLE_STYLES = frozenset(
    {"replicated_with_grad_allreduce", "colwise_gather_output", "rowwise_split_input", "colwise_rep", "rowwise_rep"}
)
"""Styles of layers whose input and output are whole, so that dividing them gains nothing."""
EXPERTS = "moe_tp_experts"
NUM_TOKENS = 4
MOST_ERROR = {torch.float32: 1e-3}
"""The largest difference allowed between logits before and after, relative to the largest logit; other dtypes have
`MOST_ROUNDED`."""
MOST_ROUNDED = 0.05


class SummedLinear(nn.Module):
    """A layer whose input channels are divided, followed by the sum over ranks. A layer that later replaces `share` is
    summed in the same way."""

    def __init__(self, share: nn.Linear, group: TensorParallel) -> None:
        super().__init__()
        self.share = share
        self._group = group

    @property
    def weight(self) -> torch.Tensor:
        """The weight of the share, for modules that ask for its dtype."""
        return self.share.weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """This rank's `(..., in_features)` to the sum over ranks, `(..., out_features)`."""
        return self._group.all_reduce(self.share(input))


@torch.no_grad()
def divide(model: nn.Module, group: TensorParallel, *, is_checked: bool) -> None:
    """Reduce a model to this rank's share. Every rank calls it on the same model.

    `is_checked`: compare the logits of a few tokens before and after.

    Raises:
        ConfigError: There is no plan, or one that isn't supported.
        ModelError: The divided model computes other logits.
    """
    if group.size == 1:
        return
    before = _logits(model) if is_checked else None
    if not sum(_divided(base, plan, group) for base, plan in _plans(model)):
        raise _refused(model, group, "has no layers that ranks can share by a plan of transformers")
    if before is not None:
        error = float((_logits(model) - before).abs().max() / before.abs().max())
        most = MOST_ERROR.get(next(model.parameters()).dtype, MOST_ROUNDED)
        if not error < most:
            raise ModelError(
                f"tensor_parallel_size: {type(model).__name__} divided over {group.size} ranks by its plan in "
                f"transformers: got logits that differ by {error:.3g} of the largest, expected less than {most:g}. "
                "Leave tensor_parallel_size out."
            )


def _plans(model: Any) -> Iterator[tuple[Any, dict[str, str]]]:
    """The model's decoders without heads, each with its plan."""
    text = model.config.get_text_config()
    for module in model.modules():
        config = getattr(module, "config", None)
        plan = getattr(config, "base_model_tp_plan", None)
        if plan and type(config) is type(text) and getattr(module, "base_model", None) is module:
            yield module, plan


def _divided(base: Any, plan: dict[str, str], group: TensorParallel) -> int:
    """Divide a decoder by its plan; returns how many of its layers and parameters were divided."""
    heads, kv_heads = base.config.num_attention_heads, getattr(base.config, "num_key_value_heads", None)
    group.shard.of(heads, "attention heads")
    if kv_heads is not None and shard_of_kv_heads(group.shard, kv_heads).count != group.size:
        raise ConfigError(
            f"tensor_parallel_size: got {group.size} for {kv_heads} key/value heads of {type(base).__name__}, which "
            f"runs by the modules of transformers, expected a divisor of {kv_heads}. Lower tensor_parallel_size."
        )
    styles = {name: style for name in _names(base) if (style := plan.get(re.sub(r"\d+", "*", name))) is not None}
    count = 0
    for name, style in styles.items():
        if style not in WHOLE_STYLES:
            _divide_one(base, name, style, group)
            count += 1
    return count


def _names(base: nn.Module) -> list[str]:
    """Names of modules, and of parameters, since experts can be parameters."""
    return [name for name, _ in base.named_modules()] + [name for name, _ in base.named_parameters()]


def _divide_one(base: nn.Module, name: str, style: str, group: TensorParallel) -> None:
    owner, _, last = name.rpartition(".")
    holder = base.get_submodule(owner)
    part = getattr(holder, last)
    if style == EXPERTS:
        part.register_forward_hook(lambda _module, _args, output: group.all_reduce(output))
    elif isinstance(part, nn.Linear) and style == "colwise":
        part.weight = _share(part.weight, 0, group.shard, name)
        part.out_features = len(part.weight)
        if part.bias is not None:
            part.bias = _share(part.bias, 0, group.shard, name)
    elif isinstance(part, nn.Linear) and style == "rowwise":
        part.weight = _share(part.weight, 1, group.shard, name)
        part.in_features = part.weight.shape[1]
        if part.bias is not None and group.rank > 0:  # the sum over ranks must have the bias once
            part.bias = nn.Parameter(torch.zeros_like(part.bias), requires_grad=False)
        setattr(holder, last, SummedLinear(part, group))
    elif isinstance(part, nn.Parameter) and part.dim() == 3 and style == "packed_colwise":
        halves: list[torch.Tensor] = [_share(half, 1, group.shard, name) for half in part.chunk(2, 1)]
        setattr(holder, last, nn.Parameter(torch.cat(halves, 1), requires_grad=False))
    elif isinstance(part, nn.Parameter) and part.dim() == 3 and style == "rowwise":
        setattr(holder, last, _share(part, 2, group.shard, name))
    else:
        raise _refused(base, group, f"has {name} ({type(part).__name__}), which is to be divided as {style!r}")


def _share(whole: torch.Tensor, axis: int, shard: Shard, name: str) -> nn.Parameter:
    """A copy of a rank's share, so that the whole tensor can be freed."""
    size = shard.of(whole.shape[axis], f"channels of {name}")
    return nn.Parameter(whole.detach().narrow(axis, shard.index * size, size).clone(), requires_grad=False)


def _logits(model: Any) -> torch.Tensor:
    """The logits of a few tokens, in float32."""
    ids = torch.arange(1, 1 + NUM_TOKENS, device=next(model.parameters()).device)[None]
    output = model(input_ids=ids, use_cache=False)
    logits: torch.Tensor = output.logits if getattr(output, "logits", None) is not None else output[0]
    return logits.float()


def _refused(model: nn.Module, group: TensorParallel, reason: str) -> ConfigError:
    return ConfigError(
        f"tensor_parallel_size: got {group.size} for {type(model).__name__}, which {reason}, expected 1. Leave "
        "tensor_parallel_size out."
    )
