"""With several steps in flight, a request with penalties goes on before the host has seen its token, and gets the same
tokens."""

from __future__ import annotations

from typing import Any

import pytest

from sensorium import LLMEngine, SamplingParams
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.serving import Planned, make_engine, serve

PENALTIES: dict[str, dict[str, Any]] = {
    "repetition": {"temperature": 0, "repetition_penalty": 1.4},
    "frequency": {"temperature": 0, "frequency_penalty": 0.6},
    "presence, drawn": {"temperature": 1.2, "seed": 5, "presence_penalty": 1.5, "logprobs": 1},
    "none": {"temperature": 0},
}
PLAN = [
    Planned(name, {"prompt_token_ids": [7, 9, 7, 11 + i]}, SamplingParams(max_tokens=30, ignore_eos=True, **values))
    for i, (name, values) in enumerate(PENALTIES.items())
]


def engine_of(num_steps: int, **settings: Any) -> LLMEngine:
    settings = {"skip_tokenizer_init": True, "num_blocks": 64, "dtype": "float32", **settings}
    return make_engine(make_checkpoint("qwen2"), device="cpu", max_steps_in_flight=num_steps, **settings)


def test_tokens_are_those_of_one_step_at_a_time() -> None:
    """Also of requests that are preempted, whose counts are made anew from what the host knows."""
    reference = serve(engine_of(1), PLAN)
    assert len({tuple(reference.tokens(name)) for name in PENALTIES}) == len(PENALTIES)
    tight = engine_of(2, num_blocks=12, block_size=8, enable_prefix_caching=False)
    for engine in (engine_of(2), engine_of(3), tight):
        served = serve(engine, PLAN)
        for name in PENALTIES:
            assert served.tokens(name) == reference.tokens(name), name
            assert served.outputs[name].outputs[0].logprobs == reference.outputs[name].outputs[0].logprobs
    assert tight.core.stats().num_preemptions > 0


@pytest.mark.parametrize(("name", "waits"), [("repetition", False), ("frequency", False), ("bad words", True)])
def test_which_requests_wait_for_their_tokens(name: str, waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Penalties once made each step wait for the one before."""
    engine = engine_of(2)
    values = {"temperature": 0, "bad_words_token_ids": ((5, 6),)} if waits else PENALTIES[name]
    in_flight, submit = [], engine.core.executor.submit

    def note(step: Any) -> Any:
        if step.chunks:
            in_flight.append(len(engine.core._in_flight))
        return submit(step)

    monkeypatch.setattr(engine.core.executor, "submit", note)
    serve(engine, [Planned("r", {"prompt_token_ids": [7, 9]}, SamplingParams(max_tokens=9, ignore_eos=True, **values))])
    assert len(in_flight) == 9
    assert any(in_flight[1:]) is not waits
