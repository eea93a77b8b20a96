"""Scales of a KV cache of 8-bit floats that a quantized checkpoint brings: for each layer one of keys, one of values.

Their names, under a layer's attention such as `model.layers.3.self_attn`: `k_scale` and `v_scale`, there or under
`attn`, `k_proj` and `v_proj`; `k_proj.output_scale` and `v_proj.output_scale`; or `kv_scale` for both.

Source: `vllm.model_executor.model_loader.weight_utils.maybe_remap_kv_scale_name`, which lists what tools write.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from sensorium.attention import Attention
from sensorium.errors import WeightsError

_SCALE = re.compile(
    r"(?P<layer>.*)\.(?:(?:attn\.|k_proj\.)?(?P<k>k_scale)|(?:attn\.|v_proj\.)?(?P<v>v_scale)"
    r"|k_proj\.(?P<k_output>output_scale)|v_proj\.(?P<v_output>output_scale)|(?:attn\.)?(?P<both>kv_scale))"
)


class KVScales:
    """Takes the scales out of a checkpoint's tensors, and gives them to the layers once these are there."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], float] = {}
        """By the attention's name from the number of its decoder layer on, and "k" or "v"."""

    def taken_from(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors that are no scales of a cache. Raises `WeightsError` for a scale that is no positive number."""
        for name, tensor in weights:
            match = _SCALE.fullmatch(name)
            if match is None:
                yield name, tensor
                continue
            scale = float(tensor) if tensor.numel() == 1 else float("nan")
            if not 0 < scale < float("inf"):
                raise WeightsError(
                    f"checkpoint key {name}: got {tensor.flatten().tolist()[:4]}, expected one positive number, the "
                    "scale of a layer's cached keys or values. Use a checkpoint with one scale for each layer."
                )
            layer, groups = _place(match["layer"]), match.groupdict()
            kinds = "kv" if groups["both"] else "k" if groups["k"] or groups["k_output"] else "v"
            self._found.update({(layer, kind): scale for kind in kinds})

    def give_to(self, model: nn.Module) -> None:
        """Set `k_scale` and `v_scale` of the layers. Raises `WeightsError` for scales of layers that aren't there."""
        layers = {
            _place(name.removesuffix(".attn")): module
            for name, module in model.named_modules()
            if isinstance(module, Attention)
        }
        for (place, kind), scale in self._found.items():
            if place not in layers:
                raise WeightsError(
                    f"scales of cached keys and values: got some for {place}, expected an attention layer of "
                    f"{type(model).__name__}, such as {next(iter(layers), 'none')}. Check that config.json belongs to "
                    "these weights."
                )
            setattr(layers[place], f"{kind}_scale", scale)


def _place(name: str) -> str:
    """A module's name from `layers` on, since what stands before differs between files and classes."""
    return name[name.rfind("layers.") :] if "layers." in name else name
