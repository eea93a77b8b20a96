"""Compares a model that runs by transformers' modules with those modules untouched, on a few prompts, at load.

The modules are run whole, one prompt after another, as transformers does; and as the engine does, all prompts in a
flat batch, cut into chunks, over a paged cache. The logits of every position must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from sensorium.model_executor.drivers import ItemRows, MediaRows, ModelDriver
from sensorium.model_executor.models.transformers.media_model import TransformersForConditionalGeneration
from sensorium.model_executor.models.transformers.media_prompts import MediaPrompt
from sensorium.model_executor.models.transformers.model import TransformersForCausalLM
from sensorium.model_executor.models.transformers.refusal import CannotRunError
from sensorium.model_executor.sampling_metadata import SamplingMetadata
from sensorium.spans import Range, Span, two_way_spans
from sensorium.worker.dummy_steps import DummySteps, IdArray

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Largest error of a position's logits that counts as equal: root of the mean square, over their standard deviation.
A wrong mask, position or cache moves them by 0.2 and more."""
SCHEDULES: tuple[tuple[int, ...], ...] = ((7, 1, 9, 6), (5, 5, 1, 1), (1, 2, 4, 1))
"""The chunks of each prompt, step by step. Where an encoder reads the prompt, that is the first chunk."""


def largest_error(
    model: TransformersForCausalLM, driver: ModelDriver, steps: DummySteps, references: Sequence[torch.Tensor]
) -> float:
    """The largest error of any position of `check_prompts`; see `TOLERANCE`. Infinite where something is no number.

    Raises whatever the modules raise.
    """
    prompts = check_prompts(model)
    got: list[list[torch.Tensor]] = [[] for _ in prompts]
    caches = steps.caches(max(map(len, prompts)), num_sequences=len(prompts))
    two_way = [two_way_spans(model.two_way, (), chunks[0]) if model.reads_source else () for chunks in SCHEDULES]
    for pieces in _steps_of(prompts):
        hidden = driver.forward(steps.step(pieces, caches, two_way=two_way))
        logits = model.compute_logits(hidden, SamplingMetadata(len(hidden)))
        for rows, part in zip(got, torch.split(logits, [end - start for _, start, end in pieces]), strict=True):
            rows.append(part)
    return max(position_error(torch.cat(rows), each) for rows, each in zip(got, references, strict=True))


def check_prompts(model: TransformersForCausalLM) -> list[IdArray]:
    """A prompt for each of `SCHEDULES`, all different."""
    return split_prompts(model.text_token_ids, [sum(chunks) for chunks in SCHEDULES])


def split_prompts(text_token_ids: Callable[[int], list[int]], lengths: Sequence[int]) -> list[IdArray]:
    """Different prompts of these lengths; `text_token_ids` gives as many ids as it is asked for."""
    ids = np.asarray(text_token_ids(sum(lengths)), dtype=np.int64)
    return np.split(ids, np.cumsum(lengths)[:-1])


def reference_logits(model: TransformersForCausalLM) -> list[torch.Tensor]:
    """Logits of `check_prompts` by the untouched modules, `(num_tokens, vocab_size)` each."""
    prompts = zip(check_prompts(model), SCHEDULES, strict=True)
    return [model.reference_logits(prompt.tolist(), chunks[0]) for prompt, chunks in prompts]


def largest_media_error(
    model: TransformersForConditionalGeneration,
    driver: ModelDriver,
    steps: DummySteps,
    references: Sequence[torch.Tensor],
) -> float:
    """The same for the model's prompts with media: each is cut through its items, which are captured one by one, and
    runs beside a prompt of text."""
    errors = [
        _media_error(model, driver, steps, prompt, mask, reference)
        for prompt, mask, reference in zip(model.media_prompts, model.media_masks, references, strict=True)
    ]
    return max(errors, default=0.0)


def media_references(model: TransformersForConditionalGeneration) -> list[torch.Tensor]:
    """Logits of the compared positions of each prompt with media, by the untouched modules."""
    return [model.reference_media_logits(prompt)[compared_rows(prompt)] for prompt in model.media_prompts]


def compared_rows(prompt: MediaPrompt) -> torch.Tensor:
    """The positions of a long prompt whose logits are compared: the last ones, and some from all over it."""
    count = len(prompt.token_ids)
    return torch.from_numpy(np.unique([*range(0, count, count // 24 + 1), *range(max(count - 8, 0), count)]))


def _media_error(
    model: TransformersForConditionalGeneration,
    driver: ModelDriver,
    steps: DummySteps,
    prompt: MediaPrompt,
    mask: npt.NDArray[np.bool_],
    reference: torch.Tensor,
) -> float:
    captured = [(part.start + np.flatnonzero(mask[part.start : part.end]), part) for part in prompt.parts]
    items = [
        (places, model.capture_part(prompt, part, places - part.start)) for places, part in captured if len(places)
    ]
    if sum(len(places) for places, _ in items) != mask.sum():
        raise CannotRunError("media change rows outside of what stands for them")
    ids, text = prompt.token_ids, check_prompts(model)[0]
    positions = model.media_positions(prompt)
    caches = steps.caches(max(len(ids), len(text)), num_sequences=2)
    wanted, got = compared_rows(prompt), []
    span = Span.of_positions(np.flatnonzero(mask))
    two_way = two_way_spans(model.two_way, [((prompt.modality,), span)], len(ids))
    bounds = _bounds(len(ids), two_way)
    beside = np.linspace(0, len(text), len(bounds)).astype(int).tolist()
    for (start, end), (begin, stop) in zip(pairwise(bounds), pairwise(beside), strict=True):
        pieces = [(text, begin, stop), (ids, start, end)]
        media = _media_of(items, start, end, stop - begin, steps.device)
        step = steps.step(pieces, caches, media=media, places=(None, positions), two_way=((), two_way))
        hidden = driver.forward(step)
        rows = wanted[(wanted >= start) & (wanted < end)] - start + stop - begin
        got.append(model.compute_logits(hidden[rows.to(hidden.device)], SamplingMetadata(len(rows))))
    return position_error(torch.cat(got), reference)


def _bounds(num_tokens: int, two_way: Sequence[Range]) -> list[int]:
    """Where the chunks of a prompt begin and end: in the middle of items, but in no span that sees itself both ways."""
    wanted = [2 * num_tokens // 5, 3 * num_tokens // 5]
    ends = [next((end for begin, end in two_way if begin < at < end), at) for at in wanted]
    return sorted({0, *ends, num_tokens})


def _media_of(
    items: Sequence[tuple[IdArray, ItemRows]], start: int, end: int, shift: int, device: torch.device
) -> MediaRows | None:
    """The media rows of positions `[start, end)`, which stand in a batch from row `shift` on."""
    placed = []
    for places, item in items:
        first, last = np.searchsorted(places, [start, end]).tolist()
        if last > first:
            placed.append((places[first:last] - start + shift, item.part(first, last)))
    return MediaRows.of(placed, device) if placed else None


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
