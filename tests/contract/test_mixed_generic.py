"""Random requests on models of transformers' modules, disturbed in every way at once, get the tokens of a run alone.

`scripts/verify_mixed_requests.py` does the same with two hundred requests each.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.mixed_generic import PREEMPTS, mixed_outcomes


@pytest.mark.parametrize("model_type", ["lfm2_moe", "gptj", "t5"])
def test_survivors_are_undisturbed(model_type: str, tmp_path: Path) -> None:
    """A state beside paged attention, attention of the model's own, and an encoder that reads the prompt."""
    outcomes = mixed_outcomes(model_type, tmp_path, 14)
    for name, outcome in outcomes.items():
        assert outcome.different == [], name
    assert any(outcome.num_aborted for outcome in outcomes.values())
    assert outcomes[PREEMPTS].num_preemptions > 0, "the pool is meant to be too small"
