"""Why an architecture can't be run in one of the ways that there are."""

from __future__ import annotations

from sensorium.errors import ModelError


class CannotRunError(ModelError):
    """Modules of Hugging Face do something that has no counterpart here. The message says what, in a few words."""
