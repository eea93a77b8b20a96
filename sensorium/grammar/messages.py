"""Messages between the engine core and the grammar processes: msgpack with a schema.

core  --CheckGrammar, CancelCheck-->  checker      core  <--Verdict--  checker
core  --LoadGrammar-->  mask server's loader       core  <--Verdict--  loader
core  --RowUpdates-->  mask server                 worker  <--RowsDone--  mask server

`RowsDone` goes to the worker, see `sensorium.token_masks`.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from sensorium.errors import SensoriumError
from sensorium.structured_outputs import StructuredOutputs

NO_CHECK = 0
"""The id of a verdict over all grammars: this tokenizer's outputs can't be held to any."""


class CheckGrammar(msgspec.Struct, frozen=True, tag=True):
    """Find out whether a grammar can be compiled within the bounds."""

    check_id: int
    grammar: StructuredOutputs


class CancelCheck(msgspec.Struct, frozen=True, tag=True):
    """Nobody waits for this check any more; unknown ids are ignored."""

    check_id: int


class LoadGrammar(msgspec.Struct, frozen=True):
    """Compile a grammar that was checked, so that rows can start with it at once; one that is there stays."""

    check_id: int
    grammar: StructuredOutputs
    cost_bytes: int
    """What the check says that it takes."""


class Verdict(msgspec.Struct, frozen=True):
    """The end of a check or of loading."""

    check_id: int
    error: str | None = None
    """Why the grammar is refused, fit for its caller; with the next two what an `InvalidRequestError` has."""
    field: str | None = None
    reason: str | None = None
    cost_bytes: int = 0
    """Memory that compiling took."""

    @classmethod
    def refused(cls, check_id: int, error: SensoriumError) -> Verdict:
        """The grammar can't be held to."""
        return cls(check_id, error.message, error.field, error.reason)


class AddRow(msgspec.Struct, frozen=True, tag=True):
    """Hold the output in a row to a grammar, from its beginning; it has these tokens already."""

    row: int
    grammar: StructuredOutputs
    token_ids: list[int]
    hides_end: bool
    """No end-of-sequence token may come, however complete the output is."""


class RemoveRow(msgspec.Struct, frozen=True, tag=True):
    """Forget a row."""

    row: int


class AppendToken(msgspec.Struct, frozen=True, tag=True):
    """A token was sampled in a row."""

    row: int
    token_id: int


class LookAhead(msgspec.Struct, frozen=True, tag=True):
    """Write the masks behind drafts of a row into the rows that follow it: into the first what may follow the first
    draft."""

    row: int
    token_ids: list[int]


RowUpdate: TypeAlias = AddRow | RemoveRow | AppendToken | LookAhead


class RowUpdates(msgspec.Struct, frozen=True):
    """Changes of one step, in order. Masks of the rows that are named are computed after all of them."""

    number: int
    updates: list[RowUpdate]
