"""Train the demo model: ``python -m training.train --out RUN``.

The run uses every GPU, or the CPU if there is none. It is resumable (start it again with the same arguments), shows a
progress bar, and writes ``RUN/log.jsonl`` (loss, learning rate, time), ``RUN/state.pt`` and ``RUN/model.safetensors``.
Batches, their order and the initial weights depend on the seed alone, and neither on the number of processes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from training.loader import Batches, batches
from training.network import Batch
from training.parallel import Team, max_processes, run_team
from training.probe import Probe
from training.trainer import Settings, Trainer

# So many steps apart the processes agree on the time and the loss is logged: both wait for the GPU.
_AGREE_EVERY, _LOG_EVERY = 10, 20
# Between them these worlds use every tower, with and without the others.
_WARM_UP_WORLDS = ("scene", "sound", "both", "clip", "none")


class Run:
    """One start of a run: the loop, its clock, its log and its saves."""

    def __init__(self, trainer: Trainer, probe: Probe | None, save_seconds: float) -> None:
        self._trainer, self._probe, self._save_seconds = trainer, probe, save_seconds
        self._team, self._settings = trainer.team, trainer.settings
        self._losses: list[Tensor] = []

    def train(self, stream: Iterator[Batch], max_seconds: float) -> None:
        """Train until the last step or the time limit.

        The learning rate follows whichever is further, the steps or the clock, so that a run against the clock ends
        with its decay complete. The clock counts training only, of this start and of those that it resumes.
        """
        trainer, steps = self._trainer, self._settings.steps
        started = time.monotonic() - trainer.seconds
        saved = trainer.seconds
        with tqdm(total=steps, initial=trainer.step, mininterval=5.0, disable=not self._team.is_leader) as bar:
            while (progress := max(trainer.step / steps, trainer.seconds / max_seconds)) < 1:
                self._losses.append(trainer.train_step(stream, progress))
                bar.update()
                if self._team.size == 1 or trainer.step % _AGREE_EVERY == 0:
                    trainer.seconds = self._team.agree(time.monotonic() - started)
                if trainer.step % _LOG_EVERY == 0:
                    is_due = trainer.seconds - saved >= self._save_seconds
                    saved = trainer.seconds if is_due else saved
                    self._report(bar, progress, is_due)
        if self._team.is_leader:
            trainer.save()

    def _report(self, bar: tqdm[None], progress: float, is_due: bool) -> None:
        """Log the mean loss since the last report, and save and probe if it is time to."""
        trainer = self._trainer
        loss = float(self._team.sum(torch.stack(self._losses).mean()))
        self._losses.clear()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"loss at step {trainer.step}: got {loss}, expected a finite number. "
                "Start again from the last save with a lower --learning-rate."
            )
        if not self._team.is_leader:
            return
        record: dict[str, Any] = {"step": trainer.step, "loss": round(loss, 5)}
        record["rate"] = round(self._settings.rate(trainer.step, progress), 6)
        record["seconds"] = round(trainer.seconds, 1)
        record["waited_seconds"] = round(trainer.waited_seconds, 1)
        if is_due:
            trainer.save()
            if self._probe is not None:
                record["accuracy"] = self._probe.accuracy(trainer.network, self._team.device)
                bar.write(" ".join(f"{name} {100 * share:.0f}" for name, share in record["accuracy"].items()))
        with (trainer.out / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(record) + "\n")
        bar.set_postfix(loss=f"{loss:.4f}")


def train(arguments: argparse.Namespace, team: Team) -> None:
    """The whole run as one process of the team."""
    names = ("steps", "tokens", "micro_batches", "learning_rate", "warmup", "decay", "seed")
    settings = Settings(**{name: getattr(arguments, name) for name in names})
    trainer = Trainer(settings, arguments.out, team)
    trainer.load(arguments.init, arguments.continue_from)
    count = settings.micro_batches
    data = Batches(settings.seed, arguments.bank, settings.tokens, int(arguments.ramp * settings.steps * count))
    mine = range(trainer.step * count + team.rank, settings.steps * count, team.size)
    stream = batches(data, mine, default_workers(team.size) if arguments.workers is None else arguments.workers)
    if team.device.type == "cuda":
        began = time.monotonic()
        trainer.warm_up([data.make(world, index=-1) for world in _WARM_UP_WORLDS])
        if team.is_leader:
            print(f"{team.size} GPU(s) are ready, compiled in {time.monotonic() - began:.0f} s", flush=True)
    probe = None
    if arguments.probe_items and team.is_leader:
        probe = Probe(arguments.held_out_bank, arguments.probe_items, batches_per_world=3)
    Run(trainer, probe, arguments.save_seconds).train(stream, arguments.max_seconds)


def default_workers(num_processes: int) -> int:
    """Cores that each process can have for its data, one being its own; 15 feed a GPU."""
    return min(max(len(os.sched_getaffinity(0)) // num_processes - 1, 1), 15)


def main() -> None:
    """Parse the recipe and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--bank", type=Path, default=Path(".assets/speech_train.npz"))
    parser.add_argument("--held-out-bank", type=Path, default=Path(".assets/speech_held_out.npz"))
    parser.add_argument("--steps", type=int, default=20000)
    tokens = 49152 if torch.cuda.is_available() else 4096
    parser.add_argument("--tokens", type=int, default=tokens, help="size of a micro-batch: rows of the language model")
    parser.add_argument("--micro-batches", type=int, default=4, help="micro-batches in a step, each of one layout")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--decay", type=float, default=0.7, help="share of the run in which the rate falls to zero")
    parser.add_argument("--ramp", type=float, default=0.06, help="share of the run in which the difficulty grows")
    parser.add_argument("--init", type=Path, help="weights to start from, as model.safetensors has them")
    parser.add_argument("--continue-from", type=Path, help="like --init, at the step and time that the file tells")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, help="a divisor of --micro-batches; by default as many as GPUs allow")
    parser.add_argument("--workers", type=int, help="data workers of each process; by default a share of the cores")
    parser.add_argument("--max-seconds", type=float, default=float("inf"), help="of training, earlier starts included")
    parser.add_argument("--save-seconds", type=float, default=60.0)
    parser.add_argument("--probe-items", type=int, default=64, help="held-out items per batch of the probe; 0: none")
    arguments = parser.parse_args()
    count = arguments.micro_batches
    processes = arguments.processes or max(n for n in range(1, max_processes() + 1) if count % n == 0)
    if count % processes:
        parser.error(f"--processes: got {processes}, expected a divisor of the {count} --micro-batches of a step.")
    arguments.out.mkdir(parents=True, exist_ok=True)
    run_team(processes, partial(train, arguments))


if __name__ == "__main__":
    main()
