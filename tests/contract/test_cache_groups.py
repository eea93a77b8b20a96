"""Models of which not every layer keeps everything: what is found again, given back and repeated changes no token."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sensorium import LLMEngine, SamplingParams
from sensorium.scheduler.paged_manager import PagedManager
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.serving import Planned, alone, make_engine, quiet_engine, serve

BLOCK_SIZE = 8
LONG = "the red bird sees a small house and says what it hears, now and then, please look. " * 3
"""Ten windows of 24 tokens, a letter each."""


def plan(request_id: str, prompt: str, max_tokens: int = 6, arrival: int = 0) -> Planned:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return Planned(request_id, prompt, params, arrival)


def num_hit_tokens(engine: LLMEngine, each: Planned) -> int:
    """Serve a request, and say how much of it came from the cache."""
    before = engine.core.stats().num_prefix_hit_tokens
    serve(engine, [each])
    return engine.core.stats().num_prefix_hit_tokens - before


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5"])
def test_an_equal_prompt_begins_at_its_last_full_block(family: str) -> None:
    engine = make_engine(make_checkpoint(family), block_size=BLOCK_SIZE)
    prompt = LONG[:100]
    assert num_hit_tokens(engine, plan("a", prompt)) == 0
    assert num_hit_tokens(engine, plan("b", prompt)) == 96
    shorter = 88 if family == "gemma3" else 0  # a state is kept at few places, and none of them is at 88
    assert num_hit_tokens(engine, plan("c", prompt[:96])) == shorter


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5"])
def test_a_conversation_goes_on_behind_its_last_answer(family: str) -> None:
    engine = make_engine(make_checkpoint(family), block_size=BLOCK_SIZE)
    served = serve(engine, [plan("a", LONG[:100], 30)])
    answer = served.tokens("a")
    prompt_ids = [*engine.preprocess("x", LONG[:100], SamplingParams()).engine_request.prompt_token_ids, *answer]
    following: Any = {"prompt_token_ids": [*prompt_ids, 5, 6, 7]}
    reference = alone(quiet_engine(make_checkpoint(family)), [plan("b", following)])
    assert num_hit_tokens(engine, plan("b", following)) == 128, "129 of the 130 tokens were computed"
    again = serve(engine, [plan("c", following)])
    assert again.tokens("c") == reference["b"]


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5"])
def test_prompts_that_share_a_beginning_share_what_is_there_of_it(family: str) -> None:
    engine = make_engine(make_checkpoint(family), block_size=BLOCK_SIZE, max_num_batched_tokens=64)
    prompts = [LONG[:cut] + tail for cut in (200, 150, 64, 30) for tail in ("now", "then?")]
    plans = [plan(str(i), prompt) for i, prompt in enumerate(prompts)]
    reference = alone(quiet_engine(make_checkpoint(family)), plans)
    for _ in range(2):
        for each in plans:
            assert serve(engine, [each]).tokens(each.request_id) == reference[each.request_id]
    assert engine.core.stats().num_prefix_hit_tokens > 600


def failing_once(forward: Callable[[Any], Any], after: int) -> Callable[[Any], Any]:
    """A model that computes everything, and then fails, in each pass of several requests from one on."""
    num_passes = 0

    def fails(inputs: Any) -> Any:
        nonlocal num_passes
        hidden = forward(inputs)
        num_passes += 1
        if inputs.attn_metadata.num_seqs > 1 and num_passes > after:
            raise RuntimeError("injected")
        return hidden

    return fails


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5"])
def test_a_pass_that_is_repeated_applies_no_state_twice(family: str) -> None:
    """A pass that raises is repeated request by request; a state that was updated in place would be updated again."""
    plans = [plan(str(i), LONG[i : 40 + 9 * i], 12) for i in range(4)]
    reference = alone(quiet_engine(make_checkpoint(family)), plans)
    engine = make_engine(make_checkpoint(family), block_size=BLOCK_SIZE)
    driver = engine.core.executor.worker.runner.passes._driver  # type: ignore[attr-defined]
    driver.forward = failing_once(driver.forward, after=1)
    served = serve(engine, plans)
    assert {each.request_id: served.tokens(each.request_id) for each in plans} == reference


def test_a_preempted_request_goes_on_from_the_last_state_that_was_kept() -> None:
    """It would compute prompt and output anew; its blocks are still there, and so is the state behind one of them."""
    plans = [plan(str(i), LONG[i : 60 + i], 40) for i in range(4)]
    reference = alone(quiet_engine(make_checkpoint("qwen3_5")), plans)
    engine = make_engine(make_checkpoint("qwen3_5"), block_size=BLOCK_SIZE, num_blocks=38)
    served = serve(engine, plans)
    assert {each.request_id: served.tokens(each.request_id) for each in plans} == reference
    assert engine.core.stats().num_preemptions > 0
    engine.step()
    engine.core.scheduler.check_idle()


def test_blocks_behind_every_window_go_back_while_the_request_runs() -> None:
    engine = make_engine(
        make_checkpoint("gemma3"),
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=64,
        num_blocks=64,
        max_steps_in_flight=1,  # what a step in flight reads is held too
    )
    engine.add_processed(engine.preprocess("a", LONG, plan("a", LONG, 100).params))
    manager = engine.core.scheduler._kv_cache
    full, window = manager.managers
    assert isinstance(full, PagedManager)
    assert isinstance(window, PagedManager)
    most_held = num_steps = 0
    while engine.has_unfinished_requests():
        engine.step()
        num_steps += 1
        for request in engine.core.scheduler._table.running:
            most_held = max(most_held, window.num_held(request))
            assert full.num_held(request) * BLOCK_SIZE >= request.num_computed_tokens
    assert num_steps > 100
    assert most_held == 1 + 24 // BLOCK_SIZE, "the window of the next token, anywhere in blocks of 8"
    assert window.pool.num_cached > 4, "what went back can still be found"


@pytest.mark.parametrize("backend", ["native_cpu", "torch_sdpa", "torch_reference"])
def test_garbage_behind_a_window_is_not_read(backend: str) -> None:
    """Blocks that went back belong to others, and what others left there may not even be numbers."""
    engine = make_engine(
        make_checkpoint("gemma3"),
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=48,
        enable_prefix_caching=False,
        device="cpu",
        attention_backend=backend,
    )
    rng = random.Random(backend)
    plans = [plan(str(i), LONG[: rng.randrange(1, 240)], 30, arrival=rng.randrange(20)) for i in range(8)]
    reference = alone(quiet_engine(make_checkpoint("gemma3")), plans)
    runner = engine.core.executor.worker.runner  # type: ignore[attr-defined]
    window = engine.core.scheduler._kv_cache.managers[1]
    submit = runner.submit

    @torch.inference_mode()
    def with_garbage(step: Any) -> Any:
        pending = submit(step)  # which reads what goes back with its own plan
        free = [i for i, count in enumerate(window.pool._ref_counts) if count == 0]
        for layer in (0, 2, 3):
            runner._kv_caches[layer][:, torch.tensor(free)] = torch.nan
        return pending

    runner.submit = with_garbage
    served = serve(engine, plans)
    assert {each.request_id: served.tokens(each.request_id) for each in plans} == reference
