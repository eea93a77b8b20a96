"""Media items of a step spread over ranks: each encodes some, whole, and all get the rows of all.

A model's towers are whole on every rank unless they are to be divided, so ranks that all encode the same items gain
nothing. Nothing is spread of a kind of media until items of it have been encoded by all ranks together once: that shows
what its rows look like, and whether the model's encoder itself needs all ranks, as one of layers that ranks share does.

Worked example, three ranks and pictures of 500, 300, 300, 200 and 100 rows: whoever has the fewest rows takes the
largest picture that is left, so the ranks encode 500, 300 + 200 and 300 + 100.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sensorium.distributed import TensorParallel
from sensorium.model_executor.drivers import EncodeJob, EncodeResult, ItemRows, ModelDriver


@dataclass(frozen=True, slots=True)
class _Look:
    """What rows of a kind of media look like: by the name of each part of `ItemRows`, width and so on, and dtype."""

    parts: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    device: torch.device

    @classmethod
    def of(cls, item: ItemRows) -> _Look:
        parts = {name: (tuple(each.shape[1:]), each.dtype) for name, each in _parts(item).items()}
        return cls(parts, item.rows.device)


class ItemSpread:
    """Encodes items as `ModelDriver.encode` does, on a group of ranks which all ask for the same items.

    Args:
        driver: Runs the model.
        group: The ranks.
    """

    def __init__(self, driver: ModelDriver, group: TensorParallel) -> None:
        self._driver = driver
        self._group = group
        self._looks: dict[str, _Look | None] = {}
        """By modality; None: the encoder needs all ranks."""
        self.num_spread = 0
        """Items that one rank has encoded for all."""

    def encode(self, jobs: Sequence[EncodeJob]) -> list[EncodeResult]:
        """See `ModelDriver.encode`."""
        spread = [i for i, job in enumerate(jobs) if self._looks.get(job.item.modality) is not None]
        if len(spread) < 2:
            return self._encode_together(jobs)
        results: dict[int, EncodeResult] = dict(
            zip(spread, self._encode_spread([jobs[i] for i in spread]), strict=True)
        )
        others = [i for i in range(len(jobs)) if i not in results]
        results |= zip(others, self._encode_together([jobs[i] for i in others]), strict=True)
        return [results[i] for i in range(len(jobs))]

    def _encode_together(self, jobs: Sequence[EncodeJob]) -> list[EncodeResult]:
        """Every rank encodes all."""
        if not jobs:
            return []
        before = self._group.num_collectives
        results = self._driver.encode(jobs)
        is_apart = self._group.num_collectives == before
        for job, result in zip(jobs, results, strict=True):
            if not is_apart:
                self._looks[job.item.modality] = None
            elif isinstance(result, torch.Tensor | ItemRows):
                self._looks.setdefault(job.item.modality, _Look.of(_as_item(result)))
        return results

    def _encode_spread(self, jobs: Sequence[EncodeJob]) -> list[EncodeResult]:
        """Each rank encodes its share. What it can't, all encode together, so that each finds out why."""
        owners = owners_of([job.item.num_rows for job in jobs], self._group.size)
        own = [i for i, owner in enumerate(owners) if owner == self._group.rank]
        with self._group.apart():
            encoded = self._driver.encode([jobs[i] for i in own]) if own else []
        found = {i: _as_item(result) for i, result in zip(own, encoded, strict=True) if self._is_usual(jobs[i], result)}
        is_found = torch.zeros(len(jobs), dtype=torch.int64, device=self._device_of(jobs))
        is_found[list(found)] = 1
        exchanged = self._group.all_reduce(is_found).bool().tolist()
        results: dict[int, EncodeResult] = {}
        for owner in range(self._group.size):
            indices = [i for i, each in enumerate(owners) if each == owner and exchanged[i]]
            results |= self._rows_from(owner, indices, jobs, found)
        self.num_spread += len(results)
        failed = [i for i in range(len(jobs)) if i not in results]
        results |= zip(failed, self._encode_together([jobs[i] for i in failed]), strict=True)
        return [results[i] for i in range(len(jobs))]

    def _rows_from(
        self, owner: int, indices: Sequence[int], jobs: Sequence[EncodeJob], found: Mapping[int, ItemRows]
    ) -> dict[int, EncodeResult]:
        """The rows of items, some of one rank's, on every rank: one broadcast for each modality and part."""
        results: dict[int, EncodeResult] = {}
        for modality in dict.fromkeys(jobs[i].item.modality for i in indices):
            members = [i for i in indices if jobs[i].item.modality == modality]
            look, counts = self._look(modality), [jobs[i].item.num_rows for i in members]
            parts: dict[str, tuple[torch.Tensor, ...]] = {}
            for name, (shape, dtype) in look.parts.items():
                if owner == self._group.rank:
                    rows = torch.cat([_parts(found[i])[name] for i in members])
                else:
                    rows = torch.empty(sum(counts), *shape, dtype=dtype, device=look.device)
                parts[name] = torch.split(self._group.broadcast(rows, owner), counts)
            for place, i in enumerate(members):
                item = {name: pieces[place] for name, pieces in parts.items()}
                results[i] = ItemRows(item.pop(""), item)
        return results

    def _is_usual(self, job: EncodeJob, result: EncodeResult) -> bool:
        """Whether there are rows, that the other ranks know how to receive."""
        if not isinstance(result, torch.Tensor | ItemRows):
            return False
        item = _as_item(result)
        return len(item) == job.item.num_rows and _Look.of(item) == self._look(job.item.modality)

    def _look(self, modality: str) -> _Look:
        look = self._looks[modality]
        assert look is not None
        return look

    def _device_of(self, jobs: Sequence[EncodeJob]) -> torch.device:
        return self._look(jobs[0].item.modality).device


def owners_of(num_rows: Sequence[int], num_ranks: int) -> list[int]:
    """The rank of each item: the largest first, each to the rank that has the fewest rows."""
    owners, loads = [0] * len(num_rows), [0] * num_ranks
    for i in sorted(range(len(num_rows)), key=lambda i: (-num_rows[i], i)):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += max(num_rows[i], 1)
    return owners


def _as_item(result: EncodeResult) -> ItemRows:
    assert isinstance(result, torch.Tensor | ItemRows)
    return ItemRows(result) if isinstance(result, torch.Tensor) else result


def _parts(item: ItemRows) -> dict[str, torch.Tensor]:
    """The tensors of an item: its rows have no name."""
    return {"": item.rows, **item.others}
