"""When an output ends."""

from __future__ import annotations

import pytest

from sensorium.messages import FinishReason
from sensorium.scheduler.stopping import StopRule
from tests.scheduler.fake_worker import EOS
from tests.scheduler.simulation import make_request

PROMPT = [[1] * 10]


@pytest.mark.parametrize(
    ("params", "token", "num_output", "expected"),
    [
        ({}, EOS, 1, (FinishReason.STOP, None)),
        ({"ignore_eos": True}, EOS, 1, None),
        ({"ignore_eos": True, "stop_token_ids": [EOS]}, EOS, 1, (FinishReason.STOP, EOS)),
        ({"stop_token_ids": [3]}, 3, 1, (FinishReason.STOP, 3)),
        ({"stop_token_ids": [3, EOS]}, EOS, 1, (FinishReason.STOP, None)),
        ({"min_tokens": 3}, EOS, 2, None),
        ({"min_tokens": 3}, EOS, 3, (FinishReason.STOP, None)),
        ({"min_tokens": 3, "stop_token_ids": [3]}, 3, 2, None),
        ({"max_tokens": 5}, 1, 4, None),
        ({"max_tokens": 5}, 1, 5, (FinishReason.LENGTH, None)),
        ({"max_tokens": 5}, EOS, 5, (FinishReason.STOP, None)),
        ({"max_tokens": None}, 1, 9, None),
        ({"max_tokens": None}, 1, 10, (FinishReason.LENGTH, None)),
        ({"max_tokens": 50}, 1, 10, (FinishReason.LENGTH, None)),
    ],
)
def test_rules(
    params: dict[str, object], token: int, num_output: int, expected: tuple[FinishReason, int | None] | None
) -> None:
    request = make_request("r", PROMPT, **({"max_tokens": 8} | params))  # type: ignore[arg-type]
    rule = StopRule.of(request.sampling_params, request.eos_token_ids, len(request.prompt_token_ids), 20)
    assert rule.check(token, 10 + num_output) == expected
