"""Training: the learning rate, resuming, batches that depend on their number alone, and several processes as one."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.multiprocessing import ProcessRaisedException

from training.loader import Batches, collate
from training.network import Batch
from training.parallel import SummedGradients, Team, run_team
from training.trainer import Settings, Trainer
from training.worlds import WORLD_WEIGHTS, Source, layout_of, sample_item, world_of

ALONE = Team(0, 1, torch.device("cpu"))
BANK = Path(__file__).parent / "spoken_words.npz"
SETTINGS = Settings(steps=4, tokens=1, micro_batches=1, learning_rate=2e-3, warmup=2, decay=0.5, seed=0)
TWO_MICRO_BATCHES = replace(SETTINGS, micro_batches=2)


def small_batch(source: Source | None = None, seed: int = 9) -> Batch:
    rng = random.Random(seed)
    layout = layout_of("none", rng)
    return collate([sample_item(rng, layout, source or Source("train", None), 2) for _ in range(2)])


def test_loss_falls_and_a_resumed_run_continues_exactly(tmp_path: Path, source: Source) -> None:
    batch = small_batch(source)
    whole = Trainer(SETTINGS, tmp_path / "whole", ALONE)
    losses = [float(whole.train_step(iter([batch]), step / 4)) for step in range(4)]
    assert losses[-1] < 0.8 * losses[0]

    (tmp_path / "parts").mkdir()
    first = Trainer(SETTINGS, tmp_path / "parts", ALONE)
    for step in range(2):
        first.train_step(iter([batch]), step / 4)
    first.save()
    second = Trainer(SETTINGS, tmp_path / "parts", ALONE)
    second.load()
    assert second.step == 2
    resumed = [float(second.train_step(iter([batch]), step / 4)) for step in range(2, 4)]
    assert resumed == pytest.approx(losses[2:], rel=1e-5)


def test_the_learning_rate_warms_up_and_decays_to_zero() -> None:
    assert SETTINGS.rate(0, 0.0) == pytest.approx(1e-3)
    assert SETTINGS.rate(2, 0.4) == pytest.approx(2e-3)
    assert SETTINGS.rate(3, 0.75) == pytest.approx(1e-3)
    assert SETTINGS.rate(4, 1.0) == 0


def test_weights_alone_continue_at_their_step_or_start_anew(tmp_path: Path) -> None:
    for name in ("first", "continued", "anew"):
        (tmp_path / name).mkdir()
    first = Trainer(SETTINGS, tmp_path / "first", ALONE)
    first.train_step(iter([small_batch()]), 0.0)
    first.seconds = 12.5
    first.save()
    saved = tmp_path / "first" / "model.safetensors"
    continued = Trainer(SETTINGS, tmp_path / "continued", ALONE)
    continued.load(continue_from=saved)
    assert (continued.step, continued.seconds) == (1, 12.5)
    anew = Trainer(SETTINGS, tmp_path / "anew", ALONE)
    anew.load(init=saved)
    assert (anew.step, anew.seconds) == (0, 0.0)
    for name, tensor in load_file(saved).items():
        assert torch.equal(continued.network.state_dict()[name], tensor.float())
        assert torch.equal(anew.network.state_dict()[name], tensor.float())


def train_two_steps(out: Path, team: Team) -> None:
    """Two steps of two micro-batches, of which each process takes its share."""
    trainer = Trainer(TWO_MICRO_BATCHES, out, team)
    share = [small_batch(seed=seed) for seed in range(4)][team.rank :: team.size]
    stream = iter(share)
    for step in range(2):
        trainer.train_step(stream, step / 4)
    trainer.seconds = team.agree(1.0 + team.rank)
    if team.is_leader:
        trainer.save()


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    states = []
    for size in (1, 2):
        out = tmp_path / str(size)
        out.mkdir()
        run_team(size, partial(train_two_steps, out))
        states.append(torch.load(out / "state.pt", weights_only=True))
    assert states[0]["seconds"] == states[1]["seconds"] == 1.0
    for name, tensor in states[0]["network"].items():
        torch.testing.assert_close(states[1]["network"][name], tensor, atol=2e-5, rtol=1e-4)


def fail_alone(team: Team) -> None:
    """The second process fails while the first waits for it."""
    if team.rank == 1:
        raise ValueError("no such bank")
    team.agree(0.0)


def test_the_failure_of_one_process_ends_all() -> None:
    with pytest.raises(ProcessRaisedException, match="no such bank"):
        run_team(2, fail_alone)


def test_gradients_are_clipped_and_absent_ones_are_zero() -> None:
    network = nn.ModuleList([nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)])
    gradients = SummedGradients(network, ALONE)
    for norm, expected in ((30.0, 1.0), (0.5, 0.5)):
        gradients.clear()
        network[0].weight.grad = torch.tensor([[0.6, 0.8]]) * norm
        gradients.sum_and_clip(1.0)
        torch.testing.assert_close(network[0].weight.grad, torch.tensor([[0.6, 0.8]]) * expected)
        assert network[1].weight.grad.tolist() == [[0.0, 0.0]]


def test_worlds_come_in_their_shares_for_every_process_and_stretch() -> None:
    total = sum(WORLD_WEIGHTS.values())
    for indices in (range(4000), range(1, 16_000, 4), range(100_000, 104_000)):
        seen = Counter(world_of(index) for index in indices)
        for world, weight in WORLD_WEIGHTS.items():
            assert seen[world] / 4000 == pytest.approx(weight / total, abs=0.004)


def test_a_batch_depends_on_its_number_alone() -> None:
    data = Batches(0, BANK, tokens=1000, ramp=10)
    number = next(index for index in range(100) if world_of(index) == "scene")
    first, again, other = data[number], data[number], data.make("scene", number + 1)
    assert torch.equal(first.input_ids, again.input_ids)
    assert first.frames is not None
    assert again.frames is not None
    assert torch.equal(first.frames, again.frames)
    assert first.input_ids.shape != other.input_ids.shape or not torch.equal(first.input_ids, other.input_ids)
