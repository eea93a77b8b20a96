"""Computes the figures of a run from its samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sensorium.entrypoints.bench.events import Sample
from sensorium.entrypoints.bench.load import LoadResult
from sensorium.entrypoints.bench.spans import Target

PERCENTILES = (50, 90, 99)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The percentile of values in ascending order, interpolated linearly.

    For example the 90th of [1, 2, 3, 4]: it lies at 0.9 * 3 = 2.7, so 3 + 0.7 * (4 - 3) = 3.7.
    """
    place = percent / 100 * (len(ordered) - 1)
    low = min(int(place), len(ordered) - 1)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def spread_ms(values_s: Iterable[float]) -> dict[str, float] | None:
    """Mean, percentiles and maximum in milliseconds; None without values."""
    ordered = sorted(values_s)
    if not ordered:
        return None
    figures = {"mean": sum(ordered) / len(ordered)}
    figures |= {f"p{percent}": percentile(ordered, percent) for percent in PERCENTILES}
    return {name: round(value * 1e3, 3) for name, value in (figures | {"max": ordered[-1]}).items()}


@dataclass(frozen=True, slots=True, eq=False)
class Times:
    """The times of the requests that succeeded, in seconds."""

    ttft: list[float]
    tpot: list[float]
    itl: list[float]
    e2e: list[float]

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> Times:
        """Of all samples without an error."""
        good = [sample for sample in samples if sample.error is None]
        return cls(
            ttft=[sample.ttft_s for sample in good],
            tpot=[each for sample in good if (each := sample.tpot_s) is not None],
            itl=[gap for sample in good for gap in sample.gaps_s],
            e2e=[sample.e2e_s for sample in good],
        )

    def spreads(self) -> dict[str, dict[str, float] | None]:
        """Percentiles of each."""
        return {f"{name}_ms": spread_ms(getattr(self, name)) for name in ("ttft", "tpot", "itl", "e2e")}


def summary(result: LoadResult, targets: Sequence[Target] = ()) -> dict[str, Any]:
    """All figures of a run. Rates are over the whole run, and count what succeeded."""
    good = [sample for sample in result.samples if sample.error is None]
    wall_s = max(result.wall_s, 1e-9)
    num_prompt = sum(sample.num_prompt_tokens for sample in good)
    num_output = sum(sample.num_output_tokens for sample in good)
    figures: dict[str, Any] = {
        "completed": len(good),
        "failed": len(result.samples) - len(good),
        "errors": dict(Counter(sample.error for sample in result.samples if sample.error is not None).most_common(8)),
        "wall_s": round(result.wall_s, 3),
        "prompt_tokens": num_prompt,
        "output_tokens": num_output,
        "token_events": sum(len(sample.token_s) for sample in good),
        "requests_per_s": round(len(good) / wall_s, 3),
        "output_tokens_per_s": round(num_output / wall_s, 2),
        "total_tokens_per_s": round((num_prompt + num_output) / wall_s, 2),
        **Times.of(good).spreads(),
    }
    if targets:
        num_met = sum(meets(sample, targets) for sample in good)
        figures["goodput"] = {
            "targets": [str(target) for target in targets],
            "requests_per_s": round(num_met / wall_s, 3),
            "share": round(num_met / len(result.samples), 4) if result.samples else 0.0,
        }
    return figures


def meets(sample: Sample, targets: Iterable[Target]) -> bool:
    """Whether a request that succeeded kept all bounds."""
    return all(_time_s(sample, target) * 1e3 <= target.most_ms for target in targets)


def _time_s(sample: Sample, target: Target) -> float:
    """For "itl" the longest gap between tokens. Zero for a time that a sample doesn't have."""
    if target.name == "itl":
        return max(sample.gaps_s, default=0.0)
    value: float | None = getattr(sample, f"{target.name}_s")
    return value or 0.0


def client_cost(result: LoadResult) -> dict[str, Any]:
    """The load generator's own costs."""
    num_events = sum(len(sample.token_s) for sample in result.samples)
    return {
        "cpu_us_per_token_event": round(result.cpu_s / num_events * 1e6, 1) if num_events else None,
        "cpu_share": round(result.cpu_s / max(result.wall_s, 1e-9), 4),
        "max_lag_ms": round(result.max_lag_s * 1e3, 3),
    }
