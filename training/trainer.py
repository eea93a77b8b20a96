"""The state of a run and what one step does to it: network, optimizers, learning rate, saving and resuming."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.network import Batch, Thinker
from training.optimizer import build_optimizers
from training.parallel import SummedGradients, Team


@dataclass(frozen=True)
class Settings:
    """The recipe. ``tokens`` is the size of a micro-batch; ``micro_batches`` are shared out to the processes."""

    steps: int
    tokens: int
    micro_batches: int
    learning_rate: float
    warmup: int
    decay: float
    seed: int

    def rate(self, step: int, progress: float) -> float:
        """Learning rate: linear warm-up, a plateau, and a linear decay to zero over the last ``decay`` of the run."""
        remaining = max(1.0 - progress, 0.0) / self.decay
        return self.learning_rate * min(1.0, (step + 1) / self.warmup, remaining)


class Trainer:
    """Network, optimizers and position of a run; ``save`` and ``load`` are inverse.

    ``seconds`` is the time spent in training, by all starts of the run. Every process of the team holds the same.
    """

    def __init__(self, settings: Settings, out: Path, team: Team) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.out, self.team = settings, out, team
        self.network = Thinker().to(team.device)
        self.optimizers = build_optimizers(self.network, settings.learning_rate)
        self._gradients = SummedGradients(self.network, team)
        self.step = 0
        self.seconds = 0.0
        self.waited_seconds = 0.0
        if team.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
            self.network.compile_blocks()

    def warm_up(self, examples: Sequence[Batch]) -> None:
        """Compile what a step runs, learning nothing."""
        for batch in examples:
            self._loss(batch.to(self.team.device)).backward()
        self._gradients.sum_and_clip(1.0)
        self._gradients.clear()
        if self.team.device.type == "cuda":
            torch.cuda.synchronize()

    def train_step(self, micro_batches: Iterator[Batch], progress: float) -> Tensor:
        """One optimizer step over this process's share of the next micro-batches.

        Returns its share of the mean loss, still on the device; the sum over the team is the mean.
        """
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.settings.rate(self.step, progress)
        total = torch.zeros((), device=self.team.device)
        for _ in range(self.settings.micro_batches // self.team.size):
            asked = time.monotonic()
            batch = next(micro_batches)
            self.waited_seconds += time.monotonic() - asked
            loss = self._loss(batch.to(self.team.device)) / self.settings.micro_batches
            loss.backward()
            total += loss.detach()
        self._gradients.sum_and_clip(1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self._gradients.clear()
        self.step += 1
        return total

    def _loss(self, batch: Batch) -> Tensor:
        device = self.team.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss: Tensor = self.network(batch)
        return loss

    def save(self) -> None:
        """Write the state of the run, and the weights in bfloat16; a reader never sees half a file."""
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "network": self.network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        torch.save(state, self.out / "state.part")
        weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in self.network.state_dict().items()}
        metadata = {"format": "pt", "step": str(self.step), "seconds": f"{self.seconds:.1f}"}
        save_file(weights, self.out / "model.part", metadata=metadata)
        (self.out / "state.part").replace(self.out / "state.pt")
        (self.out / "model.part").replace(self.out / "model.safetensors")

    def load(self, init: Path | None = None, continue_from: Path | None = None) -> None:
        """Take up the saved state of the run; if there is none, the given weights.

        Args:
            init: weights for a run that starts at its first step.
            continue_from: weights that :meth:`save` wrote; the run goes on at their step, with fresh optimizers.
        """
        path = self.out / "state.pt"
        if path.exists():
            state = torch.load(path, map_location=self.team.device, weights_only=True)
            self.step, self.seconds = state["step"], state["seconds"]
            self.network.load_state_dict(state["network"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        elif continue_from is not None:
            with safe_open(continue_from, "pt") as file:
                metadata = file.metadata()
            self.step, self.seconds = int(metadata["step"]), float(metadata["seconds"])
            self.network.load_state_dict(load_file(continue_from))
        elif init is not None:
            self.network.load_state_dict(load_file(init))
        self.team.share_weights(self.network)
