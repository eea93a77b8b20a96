"""The error of an architecture that can't run in some way."""

from __future__ import annotations

from sensorium.errors import ModelError


class CannotRunError(ModelError):
    """Modules of Hugging Face do something that this engine has no counterpart for. The message says what."""
