"""Every family with a model file, shared by 2 and by 4 ranks: whether each request's float32 greedy tokens are those
of one rank that runs it alone and whole. Rank engines cut prompts into chunks, cache, preempt and abort meanwhile.
Writes the table of docs/several_devices.md. Takes some minutes.

    PYTHONPATH=. python scripts/verify_ranks.py [CASE...]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import random
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers

from sensorium import SamplingParams, logger
from sensorium.errors import SensoriumError
from sensorium.executor import MultiProcessExecutor
from tests.helpers.checkpoints import FAMILIES, make_checkpoint
from tests.helpers.lora import TinyAdapter
from tests.helpers.mixed_requests import MEDIA, limits, random_plan
from tests.helpers.serving import Planned, make_engine, quiet_engine, serve

PAGE = Path(__file__).parents[1] / "docs" / "several_devices.md"
BEGIN, END = "<!-- verified: scripts/verify_ranks.py -->", "<!-- end -->"
SIZES = (2, 4)
PROMPTS_OF = {
    "llava_siglip": "llava",
    "llava_many_features": "llava",
    "internvl_normed": "internvl",
}
"""Variants, by the family whose prompts they take. Others that aren't in `MEDIA` take text."""


@dataclass(frozen=True)
class Case:
    """A family, and how it is served."""

    family: str
    settings: dict[str, Any] = field(default_factory=dict)
    adapter: str | None = None
    """Where a low-rank adapter's layers are in the model; None: without one."""

    @property
    def prompts_of(self) -> str:
        family = PROMPTS_OF.get(self.family, self.family)
        return family if family in MEDIA else "llama"


def cases() -> dict[str, Case]:
    """By name."""
    tensor_parallel = {"mm_encoder_tp_mode": "weights"}
    return {
        **{family: Case(family) for family in FAMILIES},
        **{f"{family}, towers divided": Case(family, tensor_parallel) for family in ("qwen2_5_vl", "llava_pixtral")},
        "qwen3_moe, by expert": Case("qwen3_moe", {"enable_expert_parallel": True}),
        "gpt_oss, by expert": Case("gpt_oss", {"enable_expert_parallel": True}),
        "llama, adapter": Case("llama", adapter=""),
        "qwen2_vl, adapter": Case("qwen2_vl", adapter="language_model"),
        "llama by transformers": Case("llama", {"model_impl": "transformers"}),
        "qwen3_moe by transformers": Case("qwen3_moe", {"model_impl": "transformers"}),
        "llava by transformers": Case("llava", {"model_impl": "transformers"}),
        "qwen2_vl by transformers": Case("qwen2_vl", {"model_impl": "transformers"}),
        "qwen2, drafts": Case("qwen2", {"speculative_config": {"prompt_lookup_min": 1}}),
        "qwen3, three steps in flight": Case("qwen3", {"max_steps_in_flight": 3}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="names of cases; all by default")
    chosen = parser.parse_args().cases
    warnings.simplefilter("ignore")
    logger.configure(logger.LogSettings("ERROR"))
    transformers.utils.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    results = read() if chosen else {}
    for name in chosen or list(cases()):
        results[name] = tried(cases()[name])
        print(f"{name}: {results[name]}", flush=True)
        write(results)


def tried(case: Case) -> list[str]:
    """For each number of ranks: how many requests had the expected tokens, or the error."""
    plan = requests(case)
    with settings_of(case) as settings:
        expected = tokens_alone(case, plan, settings)
        found = []
        for size in SIZES:
            try:
                found.append(compared(case, plan, expected, {**settings, "tensor_parallel_size": size}))
            except SensoriumError as error:
                found.append(str(error).split(". ")[0])
    return found


def requests(case: Case) -> list[Planned]:
    """Text and media, mixed."""
    plan = random_plan(case.prompts_of, 8, random.Random(case.family), spread=4, aborts=0.25)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    texts = [f"hello {i} hello {i}" for i in range(4)] if case.prompts_of != "whisper" else []
    return plan + [Planned(f"long {i}", text, params, arrival_step=i) for i, text in enumerate(texts)]


@contextmanager
def settings_of(case: Case) -> Iterator[dict[str, Any]]:
    """Of engines; an adapter's folder lives as long."""
    settings = {"device": "cpu", **case.settings}
    if limits(case.prompts_of):
        settings["limit_mm_per_prompt"] = limits(case.prompts_of)
    with TemporaryDirectory() as folder:
        if case.adapter is not None:
            saved = TinyAdapter(case.family, within=case.adapter).save(Path(folder) / "one")
            settings |= {"enable_lora": True, "lora_modules": {"one": str(saved)}}
        yield settings


def checkpoint(case: Case) -> Path:
    return make_checkpoint(case.family, dtype="float32")


def tokens_alone(case: Case, plan: list[Planned], settings: dict[str, Any]) -> dict[str, list[int]]:
    """Each request's, when nothing else is there."""
    engine = quiet_engine(checkpoint(case), **settings)
    expected = {}
    for each in plan:
        if each.abort_step is None:
            add(engine, case, each)
            expected[each.request_id] = serve(engine, []).tokens(each.request_id)
    engine.shutdown()
    return expected


def compared(case: Case, plan: list[Planned], expected: dict[str, list[int]], settings: dict[str, Any]) -> str:
    """How many requests had the expected tokens."""
    most = 200 if limits(case.prompts_of) else 40  # prompts are cut, and a step may have several media
    tight = {"num_blocks": 48, "block_size": 8, "max_num_batched_tokens": most}
    engine = make_engine(checkpoint(case), **{**tight, **settings})
    try:
        with answered_by(engine, case):
            served = serve(engine, plan)
        engine.core.scheduler.check_idle()
        executor = engine.core.executor
        assert isinstance(executor, MultiProcessExecutor)
        spread = executor.worker.runner.spread
        num_spread = 0 if spread is None else spread.num_spread
    finally:
        engine.shutdown()
    num_equal = sum(served.tokens(name) == tokens for name, tokens in expected.items())
    return f"{num_equal} of {len(expected)}" + (f", {num_spread} items spread" if num_spread else "")


def add(engine: Any, case: Case, each: Planned) -> None:
    with answered_by(engine, case):
        engine.add_request(each.request_id, each.prompt, each.params)


@contextmanager
def answered_by(engine: Any, case: Case) -> Iterator[None]:
    """Within it, every second request is one of the adapter, if there is one."""
    original = engine.add_request

    def with_adapter(request_id: str, *args: Any, **kwargs: Any) -> None:
        adapter = "one" if case.adapter is not None and sum(request_id.encode()) % 2 else None
        original(request_id, *args, **kwargs, lora_request=adapter)

    engine.add_request = with_adapter
    try:
        yield
    finally:
        engine.add_request = original


def read() -> dict[str, list[str]]:
    """The table that is there."""
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", PAGE.read_text(), re.MULTILINE)
    return {name: list(found) for name, *found in rows if name in cases()}


def write(results: dict[str, list[str]]) -> None:
    """Replace the page's table."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    lines = [f"Requests whose tokens are those of one rank, with {versions}:", ""]
    lines += ["| family | 2 ranks | 4 ranks |", "|---|---|---|"]
    lines += [f"| {name} | {' | '.join(results[name])} |" for name in cases() if name in results]
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}" + rest.partition(END)[2])


if __name__ == "__main__":
    main()
