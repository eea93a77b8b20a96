"""Runs an engine in all the ways that must not matter: alone, in batches, in chunks, from caches, preempted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sensorium.entrypoints.verification.cases import Case
from sensorium.sampling_params import SamplingParams

if TYPE_CHECKING:
    from sensorium.entrypoints.llm import LLM
    from sensorium.outputs import RequestOutput

BLOCK_SIZE = 16
CHUNK = 16
"""Tokens of a step, where prompts are cut."""


@dataclass(frozen=True, slots=True)
class Round:
    """All prompts, once."""

    name: str
    one_by_one: bool = False
    asks_prompt: bool = False
    """Whether log probabilities of the prompts are asked for, which prefix hits don't have."""


@dataclass(frozen=True, slots=True)
class Engine:
    """Settings of an engine, and the rounds that it runs."""

    settings: Mapping[str, Any]
    rounds: tuple[Round, ...]


def engines(longest: int, num_new_tokens: int, encoder_rows: int, largest_piece: int = 1) -> tuple[Engine, ...]:
    """The engines of a verification.

    Args:
        longest: Tokens of the longest prompt.
        num_new_tokens: Tokens behind each prompt.
        encoder_rows: Rows of the largest item, at least 1.
        largest_piece: Tokens of the longest piece of a prompt that can't be cut.
    """
    chunk = max(CHUNK, largest_piece)
    num_blocks = -(-(longest + num_new_tokens) // BLOCK_SIZE) + 1
    return (
        Engine(
            {"enable_prefix_caching": False},
            (Round("whole, one by one", one_by_one=True, asks_prompt=True), Round("in one batch", asks_prompt=True)),
        ),
        Engine(
            {"max_num_batched_tokens": chunk, "max_num_encoder_rows": encoder_rows},
            (Round(f"in chunks of {chunk}"), Round(f"in chunks of {chunk}, from caches")),
        ),
        Engine(
            {"num_blocks": num_blocks, "block_size": BLOCK_SIZE, "max_num_batched_tokens": max(4 * CHUNK, chunk)},
            (Round(f"preempted, with {num_blocks} blocks"),),
        ),
    )


@contextmanager
def running(settings: Mapping[str, Any]) -> Iterator[LLM]:
    """An engine, for as long as it is needed."""
    from sensorium.entrypoints.llm import LLM

    llm = LLM(**settings)
    try:
        yield llm
    finally:
        llm.shutdown()


def run_round(llm: LLM, cases: Sequence[Case], this: Round, num_new_tokens: int) -> list[RequestOutput]:
    """The outputs of all prompts."""
    params = SamplingParams(
        temperature=0,
        max_tokens=num_new_tokens,
        ignore_eos=True,
        logprobs=0,
        prompt_logprobs=0 if this.asks_prompt else None,
        detokenize=False,
    )
    if this.one_by_one:
        return [output for case in cases for output in _run(llm, [case], params)]
    return _run(llm, cases, params)


def _run(llm: LLM, cases: Sequence[Case], params: SamplingParams) -> list[RequestOutput]:
    engine = llm.engine
    finished: dict[str, Any] = {}
    names = [f"case {index}" for index in range(len(cases))]
    for name, case in zip(names, cases, strict=True):
        processed = case.prepare(llm, params)
        engine.add_processed(replace(processed, engine_request=replace(processed.engine_request, request_id=name)))
    while engine.has_unfinished_requests():
        finished |= {output.request_id: output for output in engine.step() if output.finished}
    return [finished[name] for name in names]
