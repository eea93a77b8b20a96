"""Lists of prompts: when an engine that has nothing to do begins with them."""

from __future__ import annotations

import pytest

from sensorium import LLM, SamplingParams
from sensorium.entrypoints import batch_run
from sensorium.messages import SchedulerOutput
from tests.helpers.checkpoints import make_checkpoint

PROMPTS = [{"prompt_token_ids": [3, 4, 5 + i]} for i in range(4)]
PARAMS = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> LLM:
    checkpoint = make_checkpoint("llama")
    return LLM(str(checkpoint), skip_tokenizer_init=True, device="cpu", num_blocks=64, max_num_seqs=3)


@pytest.fixture
def first_steps(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many requests each step has that begins a prompt."""
    counts: list[int] = []
    submit = llm.engine.core.executor.submit

    def noting(step: SchedulerOutput) -> object:
        if step.new_requests:
            counts.append(len(step.new_requests))
        return submit(step)

    monkeypatch.setattr(llm.engine.core.executor, "submit", noting)
    monkeypatch.setattr(batch_run, "_GATHER_S", 600.0)
    return counts


def test_it_waits_until_as_many_are_there_as_run_at_once(llm: LLM, first_steps: list[int]) -> None:
    """A step of one prompt was run while others were nearly there, and each slowed the other down."""
    llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert first_steps[0] == 3


def test_it_doesn_t_wait_for_more_than_there_are(llm: LLM, first_steps: list[int]) -> None:
    llm.generate(PROMPTS[:2], PARAMS, use_tqdm=False)
    assert first_steps == [2]


def test_a_bad_prompt_keeps_nobody_waiting(llm: LLM, first_steps: list[int]) -> None:
    found = llm.generate([PROMPTS[0], {"prompt_token_ids": []}, PROMPTS[1]], PARAMS, use_tqdm=False, return_errors=True)
    assert [each.error is not None for each in found] == [False, True, False]
    assert first_steps == [2]
