"""Media spread over ranks: each item is encoded by one of them, and all have its rows."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from sensorium import SamplingParams
from sensorium.distributed import TensorParallel
from sensorium.errors import ProcessorError
from sensorium.messages import EngineRequest, MediaItem
from sensorium.model_executor.drivers import EncodeJob, EncodeResult, ItemRows
from sensorium.spans import Span
from sensorium.worker.item_spread import ItemSpread, owners_of
from tests.helpers.ranks import on_ranks

WIDTH = 3


class Driver:
    """Gives rows that are the item's number, with the rank that made them told apart by `seen`."""

    def __init__(self, group: TensorParallel) -> None:
        self.group = group
        self.seen: list[str] = []

    def encode(self, jobs: Sequence[EncodeJob]) -> list[EncodeResult]:
        self.seen += [job.item.key for job in jobs]
        return [self.encode_one(job) for job in jobs]

    def encode_one(self, job: EncodeJob) -> EncodeResult:
        return torch.full((job.item.num_rows, WIDTH), float(job.item.index))


class Layered(Driver):
    """What deeper layers get has a width of its own."""

    def encode_one(self, job: EncodeJob) -> EncodeResult:
        rows = torch.full((job.item.num_rows, WIDTH), float(job.item.index))
        return ItemRows(rows, {"deep": rows[:, :2, None].double() + 0.5})


class Broken(Driver):
    def encode_one(self, job: EncodeJob) -> EncodeResult:
        return ProcessorError("no picture") if job.item.index == 5 else super().encode_one(job)


class Uneven(Driver):
    """One item's rows are wider than the others'."""

    def encode_one(self, job: EncodeJob) -> EncodeResult:
        return torch.full((job.item.num_rows, WIDTH + (job.item.index == 5)), float(job.item.index))


class Shared(Driver):
    """An encoder of layers that ranks share."""

    def encode_one(self, job: EncodeJob) -> EncodeResult:
        return self.group.all_reduce(torch.full((job.item.num_rows, WIDTH), float(job.item.index)))


class SometimesShared(Driver):
    def encode_one(self, job: EncodeJob) -> EncodeResult:
        rows = torch.full((job.item.num_rows, WIDTH), float(job.item.index))
        try:
            return self.group.all_reduce(rows) if job.item.index == 5 else rows
        except RuntimeError:
            return ProcessorError("needs all")


def jobs(indices: Sequence[int], modality: str = "image") -> list[EncodeJob]:
    found = []
    for index in indices:
        item = MediaItem(modality, f"{modality} {index}", Span(0, 1 + index % 4), index=index)
        request = EngineRequest("a", [0] * 8, SamplingParams(), media=(item,))
        found.append(EncodeJob(request, item))
    return found


def encoded(driver_class: type[Driver], num_ranks: int) -> list[tuple[list[EncodeResult], list[str], int]]:
    """What each rank has of seven pictures, after one; and what it encoded itself of them."""

    def run(group: TensorParallel) -> tuple[list[EncodeResult], list[str], int]:
        driver = driver_class(group)
        spread = ItemSpread(driver, group)  # type: ignore[arg-type]
        first = spread.encode(jobs([9]))
        assert isinstance(first[0], torch.Tensor | ItemRows)
        driver.seen.clear()
        return spread.encode(jobs(range(1, 8))), driver.seen, spread.num_spread

    return on_ranks(num_ranks, run)


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("driver_class", [Driver, Layered])
def test_each_item_is_encoded_once(driver_class: type[Driver], num_ranks: int) -> None:
    found = encoded(driver_class, num_ranks)
    assert sorted(key for _, seen, _ in found for key in seen) == [f"image {i}" for i in range(1, 8)]
    assert all(seen for _, seen, _ in found)
    for results, _, num_spread in found:
        assert num_spread == 7
        for job, result in zip(jobs(range(1, 8)), results, strict=True):
            assert isinstance(result, ItemRows)
            assert result.rows.shape == (job.item.num_rows, WIDTH)
            assert (result.rows == job.item.index).all()
            assert list(result.others) == (["deep"] if driver_class is Layered else [])
            for deep in result.others.values():
                assert deep.dtype == torch.float64
                assert deep.shape == (job.item.num_rows, 2, 1)
                assert (deep == job.item.index + 0.5).all()


@pytest.mark.parametrize("driver_class", [Broken, Uneven, SometimesShared])
def test_what_one_rank_can_not_give_the_others_all_encode(driver_class: type[Driver]) -> None:
    """So each has the same error, or the same unusual rows, and nobody waits for a collective that doesn't come."""
    for results, seen, num_spread in encoded(driver_class, 2):
        assert num_spread == 6
        assert "image 5" in seen
        unusual = results.pop(4)
        if driver_class is Broken:
            assert isinstance(unusual, ProcessorError)
        else:
            rows = unusual.rows if isinstance(unusual, ItemRows) else unusual
            assert isinstance(rows, torch.Tensor)
            assert rows.shape == (2, WIDTH + (driver_class is Uneven))
            assert (rows == (10 if driver_class is SometimesShared else 5)).all()
        assert all(isinstance(each, ItemRows) for each in results)


def test_an_encoder_that_needs_all_ranks_is_not_spread() -> None:
    for results, seen, num_spread in encoded(Shared, 2):
        assert num_spread == 0
        assert len(seen) == 7
        for i, rows in enumerate(results, 1):
            assert isinstance(rows, torch.Tensor)
            assert (rows == 2 * i).all()


def test_a_kind_of_media_is_first_seen_by_all() -> None:
    """Pictures are spread already, and the first sounds beside them are not."""

    def run(group: TensorParallel) -> tuple[list[str], list[float]]:
        driver = Driver(group)
        spread = ItemSpread(driver, group)  # type: ignore[arg-type]
        spread.encode(jobs([9]))
        driver.seen.clear()
        both = [each for pair in zip(jobs([1, 2]), jobs([3, 4], "audio"), strict=True) for each in pair]
        results = spread.encode(both)
        return driver.seen, [float(each.rows[0, 0] if isinstance(each, ItemRows) else each[0, 0]) for each in results]  # type: ignore[index]

    (first, values), (second, others) = on_ranks(2, run)
    assert values == others == [1, 3, 2, 4]
    assert {*first} & {*second} == {"audio 3", "audio 4"}
    assert {*first} | {*second} == {"image 1", "image 2", "audio 3", "audio 4"}


def test_rows_are_shared_out_evenly() -> None:
    assert owners_of([100, 500, 300, 200, 300], 3) == [2, 0, 1, 1, 2]
    assert owners_of([], 2) == []
    assert owners_of([0, 0], 2) == [0, 1]
