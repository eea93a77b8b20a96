"""Compares a model that runs by transformers' modules with those modules untouched, on a few prompts, at load.

The modules are run whole, one prompt after another, as transformers does; and as the engine does, all prompts in a
flat batch, cut into chunks, over a paged cache. The logits of every position must agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from sensorium.model_executor.drivers import ModelDriver
from sensorium.model_executor.models.transformers.model import TransformersForCausalLM
from sensorium.model_executor.sampling_metadata import SamplingMetadata
from sensorium.worker.dummy_steps import DummySteps, IdArray

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Largest error of a position's logits that counts as equal: root of the mean square, over their standard deviation.
A wrong mask, position or cache moves them by 0.2 and more."""
SCHEDULES: tuple[tuple[int, ...], ...] = ((7, 1, 9, 6), (5, 5, 1, 1), (1, 2, 4, 1))
"""The chunks of each prompt, step by step."""


def largest_error(
    model: TransformersForCausalLM, driver: ModelDriver, steps: DummySteps, references: Sequence[torch.Tensor]
) -> float:
    """The largest error of any position of `check_prompts`; see `TOLERANCE`. Infinite where something is no number.

    Raises whatever the modules raise.
    """
    prompts = check_prompts(model)
    got: list[list[torch.Tensor]] = [[] for _ in prompts]
    caches = steps.caches(max(map(len, prompts)), num_sequences=len(prompts))
    for pieces in _steps_of(prompts):
        hidden = driver.forward(steps.step(pieces, caches))
        logits = model.compute_logits(hidden, SamplingMetadata(len(hidden)))
        for rows, part in zip(got, torch.split(logits, [end - start for _, start, end in pieces]), strict=True):
            rows.append(part)
    return max(position_error(torch.cat(rows), each) for rows, each in zip(got, references, strict=True))


def check_prompts(model: TransformersForCausalLM) -> list[IdArray]:
    """A prompt for each of `SCHEDULES`, all different."""
    lengths = [sum(chunks) for chunks in SCHEDULES]
    ids = np.asarray(model.text_token_ids(sum(lengths)), dtype=np.int64)
    return np.split(ids, np.cumsum(lengths)[:-1])


def reference_logits(model: TransformersForCausalLM) -> list[torch.Tensor]:
    """Logits of `check_prompts` by the untouched modules, `(num_tokens, vocab_size)` each."""
    return [model.reference_logits(prompt.tolist()) for prompt in check_prompts(model)]


def _steps_of(prompts: Sequence[IdArray]) -> Iterator[list[tuple[IdArray, int, int]]]:
    starts = [0] * len(prompts)
    for sizes in zip(*SCHEDULES, strict=True):
        yield [(ids, at, at + size) for ids, at, size in zip(prompts, starts, sizes, strict=True)]
        starts = [at + size for at, size in zip(starts, sizes, strict=True)]


def position_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error of a position's logits, both `(num_tokens, vocab_size)`; see `TOLERANCE`.

    Logits that the model forbids, of minus infinity, must stand at the same places.
    """
    if got.shape != expected.shape:
        return float("inf")
    got, expected = got.float(), expected.float()
    forbidden = torch.isneginf(expected)
    if not torch.equal(torch.isneginf(got), forbidden):
        return float("inf")
    difference = (got - expected).masked_fill(forbidden, 0).square().mean(-1).sqrt()
    spread = expected.masked_fill(forbidden, 0).std(-1).clamp_min(1e-12)
    error = float((difference / spread).max())
    return error if error == error else float("inf")
