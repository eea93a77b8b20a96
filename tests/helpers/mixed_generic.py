"""Random requests on models of transformers' modules: survivors' tokens beside those of a run alone."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.mixed_requests import random_token_plan
from tests.helpers.serving import alone, make_engine, quiet_engine, serve
from tests.helpers.tiny_architectures import save_tiny, seq2seq_types, text_types

SETTINGS: dict[str, dict[str, Any]] = {
    "chunks of 16": {"max_num_batched_tokens": 16, "num_blocks": 40},
    "small pool, priorities": {"max_num_batched_tokens": 64, "num_blocks": 11, "scheduling_policy": "priority"},
    "two steps in flight, no prefix cache": {
        "max_steps_in_flight": 2,
        "max_num_batched_tokens": 100,
        "num_blocks": 20,
        "enable_prefix_caching": False,
    },
}
"""Of engines under which requests go on beside each other. Blocks hold 8 tokens."""
PREEMPTS = "small pool, priorities"
READS_WHOLE = {"max_num_batched_tokens": 64}
"""For models whose encoder reads a prompt whole."""


@dataclass(frozen=True)
class Outcome:
    """What came of a plan."""

    num_survivors: int
    different: list[str]
    """Ids of requests whose tokens weren't those of a run alone."""
    num_preemptions: int
    num_aborted: int


def mixed_outcomes(model_type: str, folder: Path, num_requests: int) -> dict[str, Outcome]:
    """Serve random requests under each of `SETTINGS`."""
    class_name = "" if model_type in text_types() else seq2seq_types()[model_type]
    save_tiny(model_type, folder, class_name=class_name)
    common = {"model_impl": "transformers", "skip_tokenizer_init": True, "max_model_len": 80, "block_size": 8}
    plan = random_token_plan(
        num_requests, random.Random(model_type), spread=num_requests // 3, aborts=0.25, max_tokens=30
    )
    expected = alone(quiet_engine(folder, **common), plan)
    outcomes = {}
    for name, settings in SETTINGS.items():
        engine = make_engine(folder, **common, **{**settings, **(READS_WHOLE if class_name else {})})
        served = serve(engine, plan)
        aborted = {each.request_id for each in plan if each.abort_step is not None}
        assert {each.request_id for each in plan} - aborted <= served.outputs.keys()
        assert all(output.error is None for output in served.outputs.values())
        different = [each for each in served.outputs if served.tokens(each) != expected[each]]
        preemptions = engine.core.stats().num_preemptions
        engine.step()  # lets the worker free what the last requests held
        engine.core.scheduler.check_idle()
        num_aborted = num_requests - len(served.outputs)
        outcomes[name] = Outcome(len(served.outputs), different, preemptions, num_aborted)
    return outcomes
