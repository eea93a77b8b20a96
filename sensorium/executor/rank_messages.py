"""Messages between the executor and the ranks other than the first.

    executor  --StartRank, RunStep, StopRank-->  rank
    executor  <--Joining, RankReady, RankFailed--  rank

A step's results come from the first rank, which is in the executor's own process, so the others send none.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from sensorium.config import ModelFeatures


class StartRank(msgspec.Struct, frozen=True, tag=True):
    """Load a share of the model. Sent once, as the first message, together with the `meeting_fd` of `ProcessGroup`."""

    settings: msgspec.Raw
    """The engine's encoded settings. Only the engine's package decodes them."""
    rank: int
    size: int


class RunStep(msgspec.Struct, frozen=True, tag=True):
    """Run a step together with the other ranks. Its large data are in the shared memory that comes with the message."""

    step: msgspec.Raw
    """An encoded `SchedulerOutput`."""


class StopRank(msgspec.Struct, frozen=True, tag=True):
    """Free everything and end."""


class Joining(msgspec.Struct, frozen=True, tag=True):
    """The settings are resolved, and the rank is about to join the group."""


class RankReady(msgspec.Struct, frozen=True, tag=True):
    """The rank's share is loaded."""

    features: ModelFeatures
    num_blocks: int


class RankFailed(msgspec.Struct, frozen=True, tag=True):
    """The rank has failed and ends."""

    error: str
    """The name of a class in `sensorium.errors`."""
    message: str


ToRank: TypeAlias = StartRank | RunStep | StopRank
FromRank: TypeAlias = Joining | RankReady | RankFailed

to_rank: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)
from_rank: msgspec.msgpack.Decoder[FromRank] = msgspec.msgpack.Decoder(FromRank)
