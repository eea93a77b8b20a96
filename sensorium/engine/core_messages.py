"""The messages between the front and the engine core.

    front  --Start, UseVocabulary, Add, Abort, Stop-->  core
    front  <--Ready, StartFailed, CoreOutputs, Died--  core

Values with a schema: `codec.py` decodes only these types.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from sensorium.engine.args import EngineArgs
from sensorium.messages import EngineOutput, LoadReport, Vocabulary
from sensorium.sampling_params import SamplingParams
from sensorium.scheduler.stats import SchedulerStats


class Start(msgspec.Struct, frozen=True, tag=True):
    """Load a model. The first message, and sent once."""

    args: EngineArgs


class UseVocabulary(msgspec.Struct, frozen=True, tag=True):
    """The vocabulary. Sent before the first request whose output is constrained."""

    vocabulary: Vocabulary


class Add(msgspec.Struct, frozen=True, tag=True):
    """Queue a request, once for each of its outputs."""

    request: msgspec.Raw
    """An encoded `EngineRequest`. Its bulk (media tensors) is in the segment that travels with the message."""
    outputs: list[tuple[str, SamplingParams]]
    """Request id and parameters of each output; the rest they share."""


class Abort(msgspec.Struct, frozen=True, tag=True):
    """End requests; ids that are unknown or finished are ignored."""

    request_ids: list[str]


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Free everything and end."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded."""

    report: LoadReport


class StartFailed(msgspec.Struct, frozen=True, tag=True):
    """The model can't be served; the core has ended."""

    error: str
    """Name of a class of `sensorium.errors`."""
    message: str


class CoreOutputs(msgspec.Struct, frozen=True, tag=True):
    """The outputs of a step."""

    outputs: list[EngineOutput]
    stats: SchedulerStats | None = None
    """Sent from time to time, and whenever the core runs out of work."""


class Died(msgspec.Struct, frozen=True, tag=True):
    """The core can't go on, and has ended."""

    message: str


ToCore: TypeAlias = Start | UseVocabulary | Add | Abort | Stop
ToFront: TypeAlias = Ready | StartFailed | CoreOutputs | Died
