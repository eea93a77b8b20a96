"""The parts of a quantization: a `QuantizationConfig` that chooses a `LinearMethod` for each layer, and the methods,
which hold the weights.

To add one, write both and register the config under its name; `int8.py` is the shortest example, and
`docs/quantization.md` tells how.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from sensorium.errors import ConfigError, ModelError

if TYPE_CHECKING:
    import torch

    from sensorium.config import KVCacheDtype
    from sensorium.model_executor.layers.quantization.layer import WeightedLayer


class LinearMethod(ABC):
    """How a layer holds its weight and multiplies with it. A method is stateless: all state is the layer's.

    A layer's life: `create_weights` when it is constructed; `before_loading` and a copy for each tensor of the
    checkpoint; `after_loading` once; then `apply` for every call.
    """

    name: ClassVar[str]
    """For the load report."""
    loads_float: ClassVar[bool] = False
    """Whether the layer has a float `weight` `(output_size, input_size)`, as in float checkpoints, until
    `after_loading`. Only such a weight can be shared with another layer or widened."""

    @abstractmethod
    def create_weights(self, layer: WeightedLayer) -> None:
        """Give the layer the parameters that a checkpoint fills, by `layer.add_parameter`."""

    def before_loading(self, layer: WeightedLayer, name: str, loaded: torch.Tensor) -> None:  # noqa: B027 -- optional
        """Called before a checkpoint's tensor is copied into the parameter `name`. May refuse it (`WeightsError`), or
        give the layer another method (`layer.start_over`)."""

    @abstractmethod
    def after_loading(self, layer: WeightedLayer) -> None:
        """Called when every parameter is filled: lay the values out for `apply`. May set `layer.method` to another
        method, as `unquantized.lay_out` does for a float weight."""

    def float_weight(self, layer: WeightedLayer) -> torch.Tensor:
        """The weight `(output_size, input_size)` in the model's dtype. Called instead of `after_loading` by layers
        whose kernels take nothing but float weights, such as experts on a GPU.

        Raises:
            ModelError: This method can't give it.
        """
        if not self.loads_float:
            raise ModelError(
                f"quantization of {layer.prefix}: got {self.name!r} for experts on {layer.weight.device.type}, "
                "expected weights that can be held in float there. Use the checkpoint that it was made from, or "
                "device='cpu'."
            )
        return layer.weight.detach()

    @abstractmethod
    def apply(self, layer: WeightedLayer, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`x @ weight.T + bias`: `(..., input_size)` to `(..., output_size)`."""


class QuantizationConfig(ABC):
    """How a model's weights are quantized: at load, or in the checkpoint already.

    It travels between processes with the engine's configuration: a frozen dataclass of plain values.
    """

    name: ClassVar[str]
    """The setting `quantization`, and `quant_method` of a checkpoint's `quantization_config`."""
    device_types: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    reads_checkpoints: ClassVar[bool] = False
    """Whether there is a `from_checkpoint`."""

    @property
    def kv_cache_dtype(self) -> KVCacheDtype:
        """What the checkpoint says that keys and values are cached in; "auto": nothing, so the model's dtype."""
        return "auto"

    @classmethod
    def at_load(cls) -> Self:
        """The config for a float checkpoint, whose weights are quantized at load.

        Raises:
            ConfigError: This quantization only reads quantized checkpoints.
        """
        raise ConfigError(
            f"quantization: got {cls.name!r} for a checkpoint with float weights, expected None or a quantization that "
            f"is made at load. Use a checkpoint that is quantized by {cls.name} already, or another quantization."
        )

    @classmethod
    def from_checkpoint(cls, settings: Mapping[str, Any]) -> Self:
        """The config for a checkpoint whose `quantization_config` is `settings`.

        Raises:
            ModelError: The settings aren't supported.
        """
        raise NotImplementedError(f"{cls.__name__} says that it reads_checkpoints, and has no from_checkpoint.")

    @abstractmethod
    def method_for(self, prefix: str, layer: WeightedLayer) -> LinearMethod:
        """How a layer holds its weight.

        Args:
            prefix: Its name in the model, as the model class gives it.
            layer: The layer, whose sizes are set, and which has no parameters yet.
        """

    def checkpoint_name(self, name: str) -> str:
        """The name under which a model's `load_weights` gets a tensor that the checkpoint calls `name`."""
        return name

    @classmethod
    def check_device(cls, device_type: str) -> None:
        """Raise `ConfigError` if this quantization doesn't run on a device type."""
        if device_type not in cls.device_types:
            raise ConfigError(
                f"quantization on {device_type}: got {cls.name!r}, expected None. "
                f"{cls.name} runs on {' and '.join(cls.device_types)} only; leave quantization out, or set device to "
                f"{cls.device_types[0]!r}."
            )
