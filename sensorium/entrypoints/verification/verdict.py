"""Compares what an engine gave with the truth, token by token."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from sensorium.entrypoints.verification.reference import Truth, spread_of
from sensorium.outputs import RequestOutput

TOLERANCE = {"float32": 2e-3, "float16": 0.05, "bfloat16": 0.25}
"""Largest error of a log probability that counts as equal, in units of the logits' standard deviation."""


@dataclass(frozen=True, slots=True)
class Result:
    """One prompt, run one way."""

    case: str
    way: str
    dtype: str
    error: float
    """Largest error of a log probability; see `TOLERANCE`."""
    num_equal_tokens: int
    num_tokens: int
    position: int | None = None
    """The first position of the sequence at which it differs; None: nowhere."""
    reason: str = ""

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs."""
        return self.position is None and not self.reason


@dataclass(frozen=True, slots=True)
class Report:
    """What a verification found."""

    model: str
    tier: str
    baseline: str
    results: tuple[Result, ...]
    parting: str = ""
    """The first layer and position at which the two models differ, if they do and it could be found."""
    versions: dict[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    """Prompts about media that the model takes, but couldn't be asked about, with the reasons."""
    lacks_media: bool = False
    """Whether the model takes media, none of which it could be asked about, though text alone was not asked for."""

    @property
    def is_equal(self) -> bool:
        """Whether everything is equal. False if nothing was compared, or of a model's media nothing was."""
        return self._compared_is_equal() and not self.lacks_media

    def _compared_is_equal(self) -> bool:
        return bool(self.results) and all(result.is_equal for result in self.results)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "is_equal": self.is_equal}

    def lines(self) -> list[str]:
        """For people."""
        header = f"{'prompt':26} {'way':34} {'dtype':9} {'tokens':>8} {'error':>9}"
        lines = [f"{self.model} ({self.tier}), compared with {self.baseline}", "", header]
        for each in self.results:
            tokens = f"{each.num_equal_tokens}/{each.num_tokens}"
            line = f"{each.case:26} {each.way:34} {each.dtype:9} {tokens:>8} {each.error:9.1e}"
            where = f"  differs at position {each.position}" if each.position is not None else ""
            lines.append(line + where + (f"  {each.reason}" if each.reason else ""))
        if self.parting:
            lines += ["", self.parting]
        if self.left_out:
            lines += ["", *(f"not asked: {each}" for each in self.left_out)]
        return [*lines, "", self._verdict()]

    def _verdict(self) -> str:
        if not self._compared_is_equal():
            return "NOT EQUAL"
        if self.lacks_media:
            return "NOT COMPARED WITH MEDIA: equal for text, and it could be asked about none"
        return "equal"


def compare(case: str, way: str, dtype: str, output: RequestOutput, truth: Truth) -> Result:
    """One output against the truth.

    Greedy tokens may differ where the two best are closer to each other than the tolerance: what follows isn't looked
    at then, since it continues another text.
    """
    if output.error is not None:
        return Result(case, way, dtype, float("inf"), 0, len(truth.token_ids), reason=str(output.error))
    prompt_error, prompt_position = _prompt_error(output, truth, dtype)
    error, position, num_equal = _output_error(output, truth, dtype)
    if prompt_position is not None:
        position = prompt_position
    return Result(case, way, dtype, max(error, prompt_error), num_equal, len(truth.token_ids), position)


def _prompt_error(output: RequestOutput, truth: Truth, dtype: str) -> tuple[float, int | None]:
    """Of the prompt's log probabilities, where they were asked for."""
    if output.prompt_logprobs is None:
        return 0.0, None
    expected, spread = truth.prompt_logprobs, spread_of(truth.prompt_logprobs)
    worst, position = 0.0, None
    for index, entry in enumerate(output.prompt_logprobs):
        token_id = truth.prompt_token_ids[index]
        if index == 0 or entry is None or token_id not in entry:
            continue
        if not np.isfinite(expected[index - 1, token_id]):
            continue
        error = _error(entry[token_id].logprob, float(expected[index - 1, token_id]), spread)
        if position is None and error > TOLERANCE[dtype]:
            position = index - 1
        worst = max(worst, error)
    return worst, position


def _output_error(output: RequestOutput, truth: Truth, dtype: str) -> tuple[float, int | None, int]:
    """The largest error of tokens' log probabilities, the first position that differs, and how many tokens don't."""
    expected, spread = truth.logprobs, spread_of(truth.logprobs)
    completion, worst = output.outputs[0], 0.0
    begin = len(truth.prompt_token_ids) - 1
    for index, (token_id, wanted) in enumerate(zip(completion.token_ids, truth.token_ids, strict=False)):
        assert completion.logprobs is not None
        error = _error(completion.logprobs[index][token_id].logprob, float(expected[index, token_id]), spread)
        worst = max(worst, error)
        margin = float(expected[index, wanted] - expected[index, token_id]) / spread
        if error > TOLERANCE[dtype] or margin > TOLERANCE[dtype]:
            return worst, begin + index, index
        if token_id != wanted:  # as good as equal, but another text from here on
            return worst, None, index
    missing = len(completion.token_ids) < len(truth.token_ids)
    return worst, begin + len(completion.token_ids) if missing else None, len(completion.token_ids)


def _error(got: float, expected: float, spread: float) -> float:
    error = abs(got - expected) / spread
    return error if error == error else float("inf")
