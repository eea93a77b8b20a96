"""Rotary position embedding: the angles for each kind of scaling, and the layer that applies them.

Angles are computed in float32 from the positions of a step, as `transformers` does (`modeling_rope_utils.py`), so there
is no table and no largest position. A model whose layers share their angles computes them once a step with `rotation`,
and passes the result to its attention layers; calling the module as `(positions, query, key)` does both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from sensorium.errors import ModelError
from sensorium.kernels import Rotation, rotary_embedding

CosSin = tuple[torch.Tensor, torch.Tensor]


class RotaryEmbedding(nn.Module):
    """Rotates the first `rotary_dim` channels of each head by angles proportional to the token's position.

    Source: Su et al. 2021, section 3.4.2. Subclasses change the inverse frequencies.

    Args:
        head_size: Channels of a head.
        rotary_dim: How many of them are rotated.
        max_position: The context length that the model was trained for.
        base: The wavelengths' base, `rope_theta`.
        is_neox_style: Rotate halves against each other (True) or neighbouring channels (False).
        mrope_section: For M-RoPE, how many frequencies follow the time, height and width position.
        is_mrope_interleaved: Time, height and width alternate from the highest frequency on, until the sections of
            height and width are used up; the rest is time's (Qwen3-VL). Otherwise each section is contiguous.
    """

    inv_freq: torch.Tensor

    def __init__(
        self,
        head_size: int,
        rotary_dim: int,
        max_position: int,
        base: float,
        is_neox_style: bool = True,
        mrope_section: tuple[int, ...] | None = None,
        is_mrope_interleaved: bool = False,
    ) -> None:
        super().__init__()
        if mrope_section is not None and sum(mrope_section) != rotary_dim // 2:
            raise ModelError(
                f"mrope_section: got {list(mrope_section)} with the sum {sum(mrope_section)}, expected the "
                "sum "
                f"{rotary_dim // 2}, half of the rotated channels. Check rope_parameters in config.json."
            )
        self.head_size = head_size
        self.rotary_dim = rotary_dim
        self.max_position = max_position
        self.base = base
        self.is_neox_style = is_neox_style
        self.scale = self.attention_factor()
        self.register_buffer("inv_freq", self.inverse_frequencies(), persistent=False)
        self._axes: torch.Tensor | None = None
        if mrope_section is not None:
            # For each frequency, the row of the positions (0 time, 1 height, 2 width) that it follows.
            sections = torch.tensor(mrope_section)
            self._axes = torch.arange(len(mrope_section)).remainder(3).repeat_interleave(sections)
            if is_mrope_interleaved:
                self._axes = torch.zeros(rotary_dim // 2, dtype=torch.int64)
                for axis in (1, 2):
                    self._axes[axis : 3 * mrope_section[axis] : 3] = axis

    def inverse_frequencies(self) -> torch.Tensor:
        """Angle per position of each channel pair, `(rotary_dim / 2,)` float32."""
        return 1.0 / self.base ** self.exponents()

    def attention_factor(self) -> float:
        """Factor on the cosines and sines."""
        return 1.0

    def exponents(self) -> torch.Tensor:
        """`2 i / rotary_dim` for channel pair `i`, `(rotary_dim / 2,)` float32."""
        return torch.arange(0, self.rotary_dim, 2, dtype=torch.float32) / self.rotary_dim

    def angles(self, positions: torch.Tensor) -> torch.Tensor:
        """Angles `(num_tokens, rotary_dim / 2)` float32 of positions `(num_tokens,)` or `(3, num_tokens)`."""
        if positions.dim() == 1:
            return positions.float()[:, None] * self.inv_freq
        if self._axes is None:
            raise ModelError(
                f"positions of a rotary embedding without M-RoPE: got shape {tuple(positions.shape)}, "
                "expected (num_tokens,). Give the config an mrope_section, or pass one row of positions."
            )
        if self._axes.device != positions.device:
            self._axes = self._axes.to(positions.device)
        return positions.float().t().index_select(1, self._axes) * self.inv_freq

    def cos_sin(self, positions: torch.Tensor) -> CosSin:
        """Cosines and sines, each `(num_tokens, rotary_dim / 2)` float32.

        Args:
            positions: `(num_tokens,)`, or with M-RoPE `(3, num_tokens)`: time, height, width.
        """
        angles = self.angles(positions)
        if self.scale == 1.0:
            return angles.cos(), angles.sin()
        return angles.cos() * self.scale, angles.sin() * self.scale

    def rotation(self, positions: torch.Tensor) -> Rotation:
        """The rotation of queries and keys at these positions (see `cos_sin`)."""
        cos, sin = self.cos_sin(positions)
        return Rotation(cos, sin, self.is_neox_style, None if self.rotary_dim == self.head_size else self.rotary_dim)

    def forward(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate by the angles of `positions` (see `cos_sin`); heads may have an axis of their own or not."""
        heads = (len(query), -1, self.head_size)
        rotated_query, rotated_key = rotary_embedding(query.view(heads), key.view(heads), *self.rotation(positions))
        return rotated_query.view(query.shape), rotated_key.view(key.shape)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"head_size={self.head_size}, rotary_dim={self.rotary_dim}, base={self.base}"


class LinearScalingRotaryEmbedding(RotaryEmbedding):
    """Positions divided by a factor. Source: Chen et al. 2023."""

    def __init__(self, *, factor: float, **kwargs: Any) -> None:
        self.factor = factor
        super().__init__(**kwargs)

    def inverse_frequencies(self) -> torch.Tensor:
        """See the base class."""
        return super().inverse_frequencies() / self.factor


class DynamicNTKScalingRotaryEmbedding(RotaryEmbedding):
    """A base that grows with the context once it exceeds the trained length. Source: NTK-aware scaling
    (bloc97).

    Hugging Face computes one base from the largest position of a forward pass. Here a token's base depends on its own
    position only, and so neither on the batch nor on how a prompt is chunked. Within the trained length both equal the
    plain embedding; beyond it they agree on decoded tokens.
    """

    def __init__(self, *, factor: float, **kwargs: Any) -> None:
        self.factor = factor
        super().__init__(**kwargs)

    def angles(self, positions: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        if positions.dim() != 1:
            return super().angles(positions)
        lengths = (positions + 1).clamp(min=self.max_position).double()
        growth = self.factor * lengths / self.max_position - (self.factor - 1)
        bases = (self.base * growth ** (self.rotary_dim / (self.rotary_dim - 2))).float()
        return positions.float()[:, None] * (1.0 / bases[:, None] ** self.exponents().to(positions.device))


class Llama3RotaryEmbedding(RotaryEmbedding):
    """Long wavelengths are stretched, short ones kept, those between interpolated. Source: Llama 3.1's code."""

    def __init__(
        self,
        *,
        factor: float,
        low_freq_factor: float,
        high_freq_factor: float,
        original_max_position_embeddings: int,
        **kwargs: Any,
    ) -> None:
        self.factor = factor
        self.low_freq_factor = low_freq_factor
        self.high_freq_factor = high_freq_factor
        self.original_max_position = original_max_position_embeddings
        super().__init__(**kwargs)

    def inverse_frequencies(self) -> torch.Tensor:
        """See the base class."""
        plain = super().inverse_frequencies()
        wavelengths = 2 * math.pi / plain
        # 0 for wavelengths that are long relative to the trained length, 1 for short ones.
        kept = (self.original_max_position / wavelengths - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        blended = (1 - kept) * plain / self.factor + kept * plain
        return torch.where(kept < 0, plain / self.factor, torch.where(kept > 1, plain, blended))


class YaRNScalingRotaryEmbedding(RotaryEmbedding):
    """Interpolation by frequency band, and an attention temperature. Source: Peng et al. 2023, section 3."""

    def __init__(
        self,
        *,
        original_max_position_embeddings: int,
        factor: float | None = None,
        attention_factor: float | None = None,
        beta_fast: float | None = None,
        beta_slow: float | None = None,
        mscale: float | None = None,
        mscale_all_dim: float | None = None,
        truncate: bool = True,
        **kwargs: Any,
    ) -> None:
        self.original_max_position = original_max_position_embeddings
        self.factor = factor or kwargs["max_position"] / original_max_position_embeddings
        self.given_attention_factor = attention_factor
        self.beta_fast = beta_fast or 32.0
        self.beta_slow = beta_slow or 1.0
        self.mscale = mscale
        self.mscale_all_dim = mscale_all_dim
        self.truncate = truncate
        super().__init__(**kwargs)

    def inverse_frequencies(self) -> torch.Tensor:
        """See the base class."""
        plain = super().inverse_frequencies()
        low, high = self._pair_with_turns(self.beta_fast), self._pair_with_turns(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.rotary_dim - 1)
        if low == high:
            high += 0.001  # makes the ramp a step
        interpolated = ((torch.arange(self.rotary_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
        return plain / self.factor * interpolated + plain * (1 - interpolated)

    def attention_factor(self) -> float:
        """See the base class."""
        if self.given_attention_factor is not None:
            return self.given_attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._temperature(self.mscale) / self._temperature(self.mscale_all_dim)
        return self._temperature(1.0)

    def _temperature(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

    def _pair_with_turns(self, turns: float) -> float:
        """The channel pair (a fractional index) that makes `turns` full turns within the trained length."""
        wavelength = self.original_max_position / turns
        return self.rotary_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(self.base))


_EMBEDDINGS: dict[str, type[RotaryEmbedding]] = {
    "default": RotaryEmbedding,
    "mrope": RotaryEmbedding,
    "linear": LinearScalingRotaryEmbedding,
    "dynamic": DynamicNTKScalingRotaryEmbedding,
    "llama3": Llama3RotaryEmbedding,
    "yarn": YaRNScalingRotaryEmbedding,
}
# For each kind of scaling: its required settings, and its optional ones.
_SETTINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        (),
    ),
    "yarn": (
        ("original_max_position_embeddings",),
        ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}


def get_rope(
    head_size: int,
    rotary_dim: int,
    max_position: int,
    base: float,
    is_neox_style: bool = True,
    rope_scaling: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,  # noqa: ARG001  part of a known signature
    partial_rotary_factor: float = 1.0,
) -> RotaryEmbedding:
    """The rotary embedding for these settings; layers with equal settings share one.

    Args:
        head_size: Channels of a head.
        rotary_dim: Rotated channels, before `partial_rotary_factor`.
        max_position: `max_position_embeddings` of the config.
        base: `rope_theta` of the config.
        is_neox_style: Rotate halves (True) or neighbouring channels (False).
        rope_scaling: A config's `rope_scaling` or `rope_parameters`: "rope_type" (or "type"), the settings of
            that type, and "mrope_section" and "mrope_interleaved" for M-RoPE.
        dtype: Accepted for models that pass it; angles are float32.
        partial_rotary_factor: Share of `rotary_dim` that is rotated.

    Raises:
        ModelError: The type is unknown or a setting is missing.
    """
    scaling = rope_scaling or {}
    rope_type = str(scaling.get("rope_type") or scaling.get("type") or "default")
    if rope_type not in _EMBEDDINGS:
        raise ModelError(
            f"rope_type: got {rope_type!r}, expected one of {sorted(_EMBEDDINGS)}. "
            "Change rope_parameters in config.json, or give the model its own rotary embedding."
        )
    required, optional = _SETTINGS.get(rope_type, ((), ()))
    if missing := [name for name in required if name not in scaling]:
        raise ModelError(
            f"rope_parameters for rope_type {rope_type!r}: got {sorted(scaling)}, expected also {missing}. "
            "Add them to config.json."
        )
    settings = tuple((name, scaling[name]) for name in (*required, *optional) if name in scaling)
    section = scaling.get("mrope_section")
    return _shared_rope(
        rope_type,
        head_size,
        int(rotary_dim * partial_rotary_factor),
        max_position,
        float(base),
        is_neox_style,
        None if section is None else tuple(section),
        bool(scaling.get("mrope_interleaved")),
        settings,
        torch.get_default_device(),
    )


@lru_cache(maxsize=64)
def _shared_rope(
    rope_type: str,
    head_size: int,
    rotary_dim: int,
    max_position: int,
    base: float,
    is_neox_style: bool,
    mrope_section: tuple[int, ...] | None,
    is_mrope_interleaved: bool,
    settings: tuple[tuple[str, Any], ...],
    device: torch.device,
) -> RotaryEmbedding:
    del device  # only part of the cache's key: an embedding's frequencies are on one device
    return _EMBEDDINGS[rope_type](
        head_size=head_size,
        rotary_dim=rotary_dim,
        max_position=max_position,
        base=base,
        is_neox_style=is_neox_style,
        mrope_section=mrope_section,
        is_mrope_interleaved=is_mrope_interleaved,
        **dict(settings),
    )
