"""Whatever an encoder returns, each item gets its rows, or the request an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sensorium.errors import ProcessorError
from sensorium.model_executor.drivers.encoder_outputs import split_rows

ROWS = torch.arange(24.0).reshape(6, 4)
"""Rows of two items of three."""

FORMS: dict[str, Any] = {
    "flat": ROWS,
    "3-D": ROWS.reshape(2, 3, 4),
    "4-D, batch and item axes": ROWS.reshape(2, 1, 3, 4),
    "4-D, one request of two items": ROWS.reshape(1, 2, 3, 4),
    "list": [ROWS[:3], ROWS[3:]],
    "tuple": (ROWS[:3], ROWS[3:]),
    "nested list": [[ROWS[:1], ROWS[1:3]], [ROWS[3:]]],
    "one list around the items": [[ROWS[:3], ROWS[3:]]],
    "crops": [ROWS[:3].reshape(3, 1, 4), ROWS[3:].reshape(3, 1, 4)],
    "pairs": [(ROWS[:3], "image"), (ROWS[3:], "video")],
    "a pair of all rows": (ROWS, "image"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_published_form_gives_the_same_rows(form: str) -> None:
    first, second = split_rows(FORMS[form], [3, 3])
    assert torch.equal(first, ROWS[:3])
    assert torch.equal(second, ROWS[3:])


def test_flat_rows_are_cut_by_uneven_counts() -> None:
    first, second = split_rows(ROWS, [4, 2])
    assert torch.equal(first, ROWS[:4])
    assert torch.equal(second, ROWS[4:])


def test_swapped_lengths_are_an_error_and_never_a_silent_shift() -> None:
    """Two rows and four would fill four and two, each with a part of the other image."""
    with pytest.raises(ProcessorError, match=r"2 \+ 4 = 6 multimodal tokens to 6 placeholders"):
        split_rows([ROWS[:2], ROWS[2:]], [4, 2])


@pytest.mark.parametrize(
    "output", [None, [], ROWS[:5], ROWS[0], "rows", [[]], [ROWS[:3], None]], ids=lambda each: str(type(each))
)
def test_what_does_not_fit_is_the_requests_error(output: Any) -> None:
    with pytest.raises(ProcessorError):
        split_rows(output, [3, 3])
