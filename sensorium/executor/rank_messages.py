"""What the executor and the ranks beside the first say to each other.

    executor  --StartRank, RunStep, StopRank-->  rank
    executor  <--Joining, RankReady, RankFailed--  rank

A step's results come from the first rank, which is in the executor's own process; the others have nothing to say of it.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from sensorium.config import ModelFeatures


class StartRank(msgspec.Struct, frozen=True, tag=True):
    """Load a share of the model. The first message, and sent once; with it comes the file of `ProcessGroup`."""

    settings: msgspec.Raw
    """The engine's settings, as its own room reads them."""
    rank: int
    size: int


class RunStep(msgspec.Struct, frozen=True, tag=True):
    """Run a step with the others. Its bulk is in the segment that travels with the message."""

    step: msgspec.Raw
    """An encoded `SchedulerOutput`."""


class StopRank(msgspec.Struct, frozen=True, tag=True):
    """Free everything and end."""


class Joining(msgspec.Struct, frozen=True, tag=True):
    """The settings are resolved; the rank goes to the meeting place."""


class RankReady(msgspec.Struct, frozen=True, tag=True):
    """The share is loaded."""

    features: ModelFeatures
    num_blocks: int


class RankFailed(msgspec.Struct, frozen=True, tag=True):
    """The rank has ended."""

    error: str
    """Name of a class of `sensorium.errors`."""
    message: str


ToRank: TypeAlias = StartRank | RunStep | StopRank
FromRank: TypeAlias = Joining | RankReady | RankFailed

to_rank: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)
from_rank: msgspec.msgpack.Decoder[FromRank] = msgspec.msgpack.Decoder(FromRank)
