"""What the worker and the grammar processes say to each other; msgpack with a schema.

worker  --CheckForm, CancelCheck-->  checker      worker  <--Verdict--  checker
worker  --LoadForm-->  mask server's loader       worker  <--Verdict--  loader
worker  --RowUpdates-->  mask server              worker  <--RowsDone--  mask server
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from sensorium.structured_outputs import StructuredOutputs

NO_CHECK = 0
"""The id of a verdict over all forms: this tokenizer's outputs can't be held to any."""


class CheckForm(msgspec.Struct, frozen=True, tag=True):
    """Find out whether a form can be compiled within the bounds."""

    check_id: int
    form: StructuredOutputs


class CancelCheck(msgspec.Struct, frozen=True, tag=True):
    """Nobody waits for this check any more; unknown ids are ignored."""

    check_id: int


class LoadForm(msgspec.Struct, frozen=True):
    """Compile a form that was checked, so that rows can start with it at once; one that is there stays."""

    check_id: int
    form: StructuredOutputs
    cost_bytes: int
    """What the check says that it takes."""


class Verdict(msgspec.Struct, frozen=True):
    """The end of a check or of loading."""

    check_id: int
    error: str | None = None
    """Why the form is refused, fit for its caller."""
    cost_bytes: int = 0
    """Memory that compiling took."""


class AddRow(msgspec.Struct, frozen=True, tag=True):
    """Hold the output in a slot to a form, from its beginning; it has these tokens already."""

    slot: int
    form: StructuredOutputs
    token_ids: list[int]
    hides_end: bool
    """No end-of-sequence token may come, however complete the output is."""


class RemoveRow(msgspec.Struct, frozen=True, tag=True):
    """Forget a slot."""

    slot: int


class AppendToken(msgspec.Struct, frozen=True, tag=True):
    """A token was sampled in a slot."""

    slot: int
    token_id: int


class RowFailure(msgspec.Struct, frozen=True):
    """Why a row can't go on, fit for its caller."""

    message: str
    status: int = 400


RowUpdate: TypeAlias = AddRow | RemoveRow | AppendToken


class RowUpdates(msgspec.Struct, frozen=True):
    """Changes of one step, in order. Masks of the rows that are named are computed after all of them."""

    number: int
    updates: list[RowUpdate]


class RowsDone(msgspec.Struct, frozen=True):
    """The masks of a `RowUpdates` are in shared memory."""

    number: int
    failures: dict[int, RowFailure]
    """By slot: rows that can't go on."""
