"""The training loop: optimiser, schedule, average of the weights, checkpoints. It knows nothing of what is
trained, but that a task gives a loss for the sequences it is handed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recycle_ext.errors import RecycleError
from recycle_ext.train.workers import Workers


@dataclass(frozen=True)
class TrainOptions:
    """What can be set; defaults are those of the shipped module."""

    steps: int = 2800
    batch_sequences: int = 16  # of a step, over all processes and micro-batches
    accumulate: int = 1  # micro-batches of a step
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.99  # of the weights; 0: none
    seed: int = 0
    evaluate_every: int = 150
    save_seconds: float = 240.0


class Task(nn.Module):
    """What is trained. forward(index) is the loss of the sequences ``index``, [] float32, its mean over
    rows; evaluate() measures on what is held out. Parameters that require gradients are trained.
    """

    n_train: int
    fingerprint = ""  # of a frozen base

    def begin_step(self, done: float) -> None:
        """Told before each step the share of the training that is done."""

    def evaluate(self) -> dict[str, float]:
        """Figures by name."""
        raise NotImplementedError


class Trainer:
    """Trains a task. A step's sequences are the same whatever the number of processes and micro-batches."""

    def __init__(self, task: Task, options: TrainOptions, workers: Workers) -> None:
        self.task = task
        self.options = options
        self.workers = workers
        self.parallel = workers.parallel(task)
        self.trained = {n: p for n, p in task.named_parameters() if p.requires_grad}
        parameters = list(self.trained.values())
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": [p for p in parameters if p.dim() == 2],
                    "weight_decay": options.weight_decay,
                },
                {"params": [p for p in parameters if p.dim() != 2], "weight_decay": 0.0},
            ],
            lr=options.learning_rate,
            betas=(0.9, 0.95),
        )
        self.average = (
            {n: p.detach().clone() for n, p in self.trained.items()} if options.ema else {}
        )
        self.step = 0
        share = options.batch_sequences // (options.accumulate * workers.count)
        if share * options.accumulate * workers.count != options.batch_sequences:
            raise RecycleError(
                f"--batch-sequences is {options.batch_sequences}; it must be a multiple of --accumulate "
                f"times the processes, {options.accumulate} x {workers.count}"
            )
        if options.batch_sequences > task.n_train:
            raise RecycleError(
                f"--batch-sequences is {options.batch_sequences}, and there are {task.n_train} sequences "
                "to train on"
            )

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, then a cosine down to a twentieth."""
        options = self.options
        if step < options.warmup_steps:
            return options.learning_rate * (step + 1) / options.warmup_steps
        done = (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
        return options.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))

    def batch(self, step: int) -> list[int]:
        """Sequences of a step: each epoch a new order, the same after a resume."""
        size = self.options.batch_sequences
        a_epoch = self.task.n_train // size
        generator = torch.Generator().manual_seed(self.options.seed * 1000 + step // a_epoch)
        order = torch.randperm(self.task.n_train, generator=generator)
        start = step % a_epoch * size
        return order[start : start + size].tolist()

    def train_step(self) -> float:
        """One step; returns its loss."""
        options, workers = self.options, self.workers
        self.task.train()
        self.task.begin_step(self.step / options.steps)
        mine = self.batch(self.step)[workers.rank :: workers.count]
        size = len(mine) // options.accumulate
        total = torch.zeros((), device=workers.device)
        for micro in range(options.accumulate):
            loss = self.parallel(mine[micro * size : (micro + 1) * size]) / options.accumulate
            loss.backward()
            total += loss.detach()
        loss = float(workers.sum(total)) / workers.count
        if math.isfinite(loss):
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(self.step)
            torch.nn.utils.clip_grad_norm_(self.trained.values(), options.clip)
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.average:
            # Young averages forget the start faster.
            keep = min(options.ema, (1 + self.step) / (10 + self.step))
            kept = list(self.average.values())
            torch._foreach_lerp_(kept, [p.detach() for p in self.trained.values()], 1 - keep)
        return loss

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The task's figures, of the averaged weights."""
        self.task.eval()
        with self.averaged():
            return self.task.evaluate()

    def averaged(self) -> _Swapped:
        """Puts the averaged weights in place, for as long as the context lasts."""
        return _Swapped(self.trained, self.average)

    def save(self, path: Path) -> None:
        """All that a resumed run needs. Another process reads the file whole, or the one before."""
        if not self.workers.leads:
            return
        state = {
            "trained": {n: p.detach() for n, p in self.trained.items()},
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "base": self.task.fingerprint,
            "options": asdict(self.options),
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        part.replace(path)

    def load(self, path: Path) -> None:
        """Continues from save()."""
        state: dict[str, Any] = torch.load(
            path, map_location=self.workers.device, weights_only=True
        )
        if state["base"] != self.task.fingerprint:
            raise RecycleError(f"--resume: {path} is of another base model")
        for name, value in asdict(self.options).items():
            # How often is told and saved changes nothing in what is trained.
            if name not in ("evaluate_every", "save_seconds") and state["options"][name] != value:
                raise RecycleError(
                    f"--resume: {name} is {value}, and {path} was begun with {state['options'][name]}"
                )
        with torch.no_grad():
            for name, parameter in self.trained.items():
                held = state["trained"].get(name)
                if held is None or held.shape != parameter.shape:
                    raise RecycleError(f"--resume: {path} is of a module of another shape ({name})")
                parameter.copy_(held)
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def run(self, checkpoint: Path) -> Iterator[tuple[int, float, dict[str, float] | None]]:
        """Trains to the last step, saving on the way; yields step, loss and, at times, the figures."""
        options = self.options
        saved = time.monotonic()
        while self.step < options.steps:
            loss = self.train_step()
            if not math.isfinite(loss):
                good = (
                    f"the last good state is {checkpoint}"
                    if checkpoint.exists()
                    else "none was saved"
                )
                raise RecycleError(
                    f"training: the loss is {loss} at step {self.step}; {good}. "
                    "A smaller --lr or --clip may help."
                )
            last = self.step == options.steps
            if last or time.monotonic() - saved > options.save_seconds:
                self.save(checkpoint)
                saved = time.monotonic()
            told = self.step % options.evaluate_every == 0 or last
            yield self.step, loss, self.evaluate() if told else None


class _Swapped:
    """Context: some tensors in the place of parameters."""

    def __init__(self, parameters: dict[str, Tensor], values: dict[str, Tensor]) -> None:
        self.pairs = [(parameters[name], value) for name, value in values.items()]

    def _swap(self) -> None:
        with torch.no_grad():
            for parameter, value in self.pairs:
                held = parameter.detach().clone()
                parameter.copy_(value)
                value.copy_(held)

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *error: object) -> None:
        self._swap()
