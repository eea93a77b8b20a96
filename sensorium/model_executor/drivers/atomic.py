"""Tier 0 where text and media can't be told apart: media go through `forward` whole, as in the original engine."""

from __future__ import annotations

from collections.abc import Sequence

from sensorium.errors import ModelError
from sensorium.model_executor.drivers.base import EncodeJob, EncodeResult
from sensorium.model_executor.drivers.text import TextDriver


class AtomicDriver(TextDriver):
    """A chunk that has media brings the mapped arguments of the items within it.

    The worker gives a chunk with media a call of its own: a token that another request happened to sample can then
    never be taken for a placeholder.
    """

    def encode(self, jobs: Sequence[EncodeJob]) -> list[EncodeResult]:
        """Never asked for: the scheduler knows that this model's items aren't encoded apart."""
        raise ModelError("a model in atomic mode encodes media in its forward only")
