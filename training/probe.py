"""Accuracy by skill without generating: an answer counts if every one of its tokens is the most likely one.

Greedy generation gives exactly the reference answer if and only if that holds, and one forward pass tells.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from training.dialogue import Item
from training.encoding import IGNORE
from training.loader import collate
from training.network import Batch, Thinker
from training.speech import SpeechBank
from training.worlds import WORLD_WEIGHTS, Source, layout_of, sample_item


class Probe:
    """Held-out items, collated once: other seed, fonts and voices than in training."""

    def __init__(self, bank: Path, items_per_batch: int, batches_per_world: int, seed: str = "held out") -> None:
        rng = random.Random(seed)
        source = Source("held_out", SpeechBank.load(bank))
        self._batches: list[tuple[list[Item], Batch]] = []
        for world in WORLD_WEIGHTS:
            for _ in range(batches_per_world):
                layout = layout_of(world, rng)
                items = [sample_item(rng, layout, source, num_turns=1) for _ in range(items_per_batch)]
                self._batches.append((items, collate(items)))

    @torch.no_grad()
    def accuracy(self, network: Thinker, device: torch.device) -> dict[str, float]:
        """Share of right answers by skill. Runs eagerly: compiling for inference would take longer than the probe."""
        marks: dict[str, list[bool]] = defaultdict(list)
        with torch.compiler.set_stance("force_eager"):
            for items, batch in self._batches:
                for item, is_right in zip(items, exact_matches(network, batch.to(device)), strict=True):
                    marks[item.turns[0].skill].append(is_right)
        return {skill: sum(values) / len(values) for skill, values in sorted(marks.items())}


def exact_matches(network: Thinker, batch: Batch) -> Sequence[bool]:
    """For each item, whether all answer tokens are predicted."""
    with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=batch.input_ids.is_cuda):
        predicted = network.lm_head(network.hidden_states(batch)[:, :-1]).argmax(-1)
    labels = batch.labels[:, 1:]
    right: list[bool] = ((predicted == labels) | (labels == IGNORE)).all(dim=1).tolist()
    return right
