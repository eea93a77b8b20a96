"""What all bodies of requests share."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Body(BaseModel):
    """Refuses fields that it doesn't have, and values of another type."""

    model_config = ConfigDict(extra="forbid", strict=True)
