"""Train the demo model: ``python -m training.train --out RUN``.

The run is resumable (start it again with the same arguments), shows a progress bar, and writes ``RUN/log.jsonl`` (loss
and learning rate), ``RUN/state.pt`` and ``RUN/model.safetensors``. It uses a GPU if there is one. Batches, their order
and the initial weights depend on the seed alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from training.loader import Batches, batches
from training.network import Batch, Thinker
from training.optimizer import build_optimizers
from training.probe import Probe


@dataclass(frozen=True)
class Settings:
    """The recipe. ``tokens`` is the size of a micro-batch in rows of the language model."""

    steps: int
    tokens: int
    micro_batches: int
    learning_rate: float
    warmup: int
    decay: float
    seed: int
    workers: int

    def rate(self, step: int, progress: float) -> float:
        """Learning rate: linear warm-up, a plateau, and a linear decay to zero over the last ``decay`` of the run."""
        remaining = max(1.0 - progress, 0.0) / self.decay
        return self.learning_rate * min(1.0, (step + 1) / self.warmup, remaining)


class Trainer:
    """Network, optimizers and position of a run; ``save`` and ``load`` are inverse."""

    def __init__(self, settings: Settings, out: Path, device: torch.device) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.out, self.device = settings, out, device
        self.network = Thinker().to(device)
        self.optimizers = build_optimizers(self.network, settings.learning_rate)
        self.step = 0
        self.waited_seconds = 0.0
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
            self.network.compile_blocks()

    def train_step(self, micro_batches: Iterator[Batch], progress: float) -> Tensor:
        """One optimizer step over the next micro-batches; the mean loss, still on the device."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.settings.rate(self.step, progress)
        total = torch.zeros((), device=self.device)
        for _ in range(self.settings.micro_batches):
            asked = time.monotonic()
            batch = next(micro_batches).to(self.device)
            self.waited_seconds += time.monotonic() - asked
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                loss = self.network(batch) / self.settings.micro_batches
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return total

    def save(self) -> None:
        """Write the state of the run and the weights in bfloat16."""
        state = {
            "step": self.step,
            "network": self.network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        torch.save(state, self.out / "state.part")
        (self.out / "state.part").rename(self.out / "state.pt")
        weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in self.network.state_dict().items()}
        save_file(weights, self.out / "model.safetensors", metadata={"format": "pt"})

    def load(self) -> None:
        """Continue from the saved state, if there is one."""
        path = self.out / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.step = state["step"]
        self.network.load_state_dict(state["network"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def run(trainer: Trainer, data: Batches, probe: Probe | None, max_seconds: float, save_every: int) -> None:
    """Train until the last step or the time limit, saving (and probing) on the way.

    The learning rate follows whichever is further, the steps or the clock, so that a run against the clock ends with
    its decay complete.
    """
    settings, started = trainer.settings, time.monotonic()
    start, stop = trainer.step * settings.micro_batches, settings.steps * settings.micro_batches
    stream = batches(data, start, stop, settings.workers)
    log = (trainer.out / "log.jsonl").open("a", encoding="utf-8")
    losses: list[Tensor] = []
    with tqdm(total=settings.steps, initial=trainer.step, mininterval=5.0) as bar:
        while (progress := max(trainer.step / settings.steps, (time.monotonic() - started) / max_seconds)) < 1:
            losses.append(trainer.train_step(stream, progress))
            bar.update()
            if trainer.step % 20 == 0:
                mean = float(torch.stack(losses).mean())
                losses.clear()
                record: dict[str, Any] = {"step": trainer.step, "loss": round(mean, 4)}
                record["seconds"] = round(time.monotonic() - started, 1)
                record["waited_seconds"] = round(trainer.waited_seconds, 1)
                if trainer.step % save_every == 0:
                    trainer.save()
                    if probe is not None:
                        record["accuracy"] = probe.accuracy(trainer.network, trainer.device)
                        bar.write(" ".join(f"{name} {100 * share:.0f}" for name, share in record["accuracy"].items()))
                log.write(json.dumps(record) + "\n")
                log.flush()
                bar.set_postfix(loss=f"{mean:.3f}")
    trainer.save()
    log.close()


def main() -> None:
    """Parse the recipe and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--bank", type=Path, default=Path(".assets/speech_train.npz"))
    parser.add_argument("--held-out-bank", type=Path, default=Path(".assets/speech_held_out.npz"))
    parser.add_argument("--steps", type=int, default=4000)
    # Large batches on a GPU: launching the kernels of a step takes longer than small ones run.
    tokens = 131072 if torch.cuda.is_available() else 4096
    parser.add_argument("--tokens", type=int, default=tokens, help="rows of the language model in a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=2, help="micro-batches in a step, each of one layout")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--decay", type=float, default=0.4)
    parser.add_argument("--ramp", type=float, default=0.12, help="share of the run in which the difficulty grows")
    parser.add_argument("--init", type=Path, help="weights to start from, as model.safetensors has them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--max-seconds", type=float, default=float("inf"))
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--probe-items", type=int, default=64, help="held-out items per batch of the probe; 0: none")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    names = ("steps", "tokens", "micro_batches", "learning_rate", "warmup", "decay", "seed", "workers")
    settings = Settings(**{name: getattr(arguments, name) for name in names})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = Trainer(settings, arguments.out, device)
    if arguments.init is not None:
        trainer.network.load_state_dict(load_file(arguments.init))
    trainer.load()
    ramp = int(arguments.ramp * settings.steps * settings.micro_batches)
    data = Batches(settings.seed, arguments.bank, settings.tokens, ramp)
    probe = (
        Probe(arguments.held_out_bank, arguments.probe_items, batches_per_world=3) if arguments.probe_items else None
    )
    run(trainer, data, probe, arguments.max_seconds, arguments.save_every)


if __name__ == "__main__":
    main()
