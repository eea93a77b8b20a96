"""Backends of attention, for towers of V0 that have a way of their own for each."""

from __future__ import annotations

from enum import Enum, auto

__all__ = ["_Backend", "backend_name_to_enum"]


class _Backend(Enum):
    """V0's backends. `get_vit_attn_backend` of `models.utils` says which of them a tower's code is to take."""

    FLASH_ATTN = auto()
    XFORMERS = auto()
    ROCM_FLASH = auto()
    TORCH_SDPA = auto()
    OPENVINO = auto()
    FLASHINFER = auto()
    PALLAS = auto()
    IPEX = auto()
    NO_ATTENTION = auto()


def backend_name_to_enum(backend_name: str) -> _Backend | None:
    """The backend of a name; None if there is none of it."""
    return _Backend.__members__.get(backend_name)
