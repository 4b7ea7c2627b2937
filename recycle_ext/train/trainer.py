"""The training loop: optimizer, schedule, average of the weights, checkpoints.

A task gives the loop its parameters and the loss of given sequences; the loop knows nothing else of what is trained.
"""

from __future__ import annotations

import abc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from recycle_ext.errors import RecycleError
from recycle_ext.files import whole_file
from recycle_ext.train.workers import Workers, gradient_reduction

_SMALLER = "A smaller --lr or --clip may help."


@dataclass(frozen=True)
class TrainOptions:
    """Options of a run; the defaults are those of the shipped module."""

    steps: int = 2800
    batch_sequences: int = 16  # of a step, over all processes and micro-batches
    accumulate: int = 1  # micro-batches of a step
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01  # of matrices
    clip: float = 1.0  # max norm of the gradient
    ema: float = 0.99  # decay of the weights' average; 0: no average
    seed: int = 0
    evaluate_every: int = 150  # steps
    save_seconds: float = 240.0


@dataclass(frozen=True)
class TrainStep:
    """One step of a run, counted from 1. loss: nats a row. figures: of the task's evaluate(), at some steps."""

    number: int
    loss: float
    learning_rate: float
    figures: dict[str, float] | None


class Task(nn.Module, abc.ABC):
    """What is trained: the parameters of its child modules.

    forward(index) is the loss of the sequences ``index``, nats, [] float32, mean over rows.
    """

    n_train: int  # sequences to train on

    def begin_step(self, done: float) -> None:
        """Called before each step with the share of the steps that are done, in [0, 1)."""

    @abc.abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Figures on the held-out sequences, by name."""

    @abc.abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the trained models."""


def rate_factor(step: int, options: TrainOptions) -> float:
    """The learning rate of a step (from 0) in units of ``options.learning_rate``.

    Linear warm-up, then a cosine down to a twentieth (SGDR, Loshchilov and Hutter 2017, eq. 5). For LambdaLR, because
    LinearLR and CosineAnnealingLR in sequence need at least one step of warm-up.
    """
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    done = (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))


def averaged_model(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential average of the weights, which begins as a copy of ``model``.

    The decay grows to ``decay`` as (1 + n) / (10 + n) over the updates n, so that the first weights are soon forgotten.
    """

    def update(averaged: list[Tensor], current: list[Tensor], n_averaged: Tensor | int) -> None:
        n = int(n_averaged)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averaged, current, n_averaged)

    average = AveragedModel(model, multi_avg_fn=update)
    average.update_parameters(model)  # AveragedModel copies at its first update.
    return average


class Trainer:
    """Trains a task. A step's sequences are the same for every number of processes and micro-batches.

    arguments: what a saved state says of the run (``Record.arguments``).
    """

    def __init__(
        self, task: Task, options: TrainOptions, workers: Workers, arguments: Mapping[str, Any] | None = None
    ) -> None:
        self.task = task
        self.arguments = dict(arguments or {})
        self.saved: tuple[Path, int] | None = None  # the file of the state saved last, and its step
        self.options = options
        self.workers = workers
        self.parallel = workers.parallel(task)
        parameters = list(task.parameters())
        matrices = [p for p in parameters if p.dim() == 2]
        others = [p for p in parameters if p.dim() != 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=options.learning_rate,
            betas=(0.9, 0.95),
        )
        self.schedule = LambdaLR(self.optimizer, lambda step: rate_factor(step, options))
        # The children alone: a copy of the task would copy its text too.
        self._children = nn.ModuleDict(dict(task.named_children()))
        self.average = averaged_model(self._children, options.ema) if options.ema else None
        self.step = 0

    def batch(self, step: int) -> list[int]:
        """The sequences of a step. The order is a function of seed and epoch, so a resumed run goes on with it."""
        size = self.options.batch_sequences
        steps_per_epoch = self.task.n_train // size
        epoch, index = divmod(step, steps_per_epoch)
        generator = torch.Generator().manual_seed(self.options.seed * 1000 + epoch)
        order = torch.randperm(self.task.n_train, generator=generator)
        return order[index * size : (index + 1) * size].tolist()

    def train_step(self, stop: Callable[[], bool] = lambda: False) -> tuple[float, float, bool]:
        """One step of the optimizer; returns the loss, the gradient's norm before clipping, and whether to stop.

        The loss is the mean over all processes; all stop where one does. A nonfinite loss or gradient leaves the
        weights as they are.
        """
        options, workers = self.options, self.workers
        self.task.train()
        self.task.begin_step(self.step / options.steps)
        sequences = self.batch(self.step)[workers.rank :: workers.count]
        size = len(sequences) // options.accumulate
        total = torch.zeros((), device=workers.device)
        for micro in range(options.accumulate):
            part = sequences[micro * size : (micro + 1) * size]
            with gradient_reduction(self.parallel, enabled=micro == options.accumulate - 1):
                loss = self.parallel(part) / options.accumulate
                loss.backward()
            total += loss.detach()
        norm = float(torch.nn.utils.clip_grad_norm_(self.task.parameters(), options.clip))
        loss_sum, n_stopped = workers.sum(torch.stack((total, torch.full_like(total, stop())))).tolist()
        mean = loss_sum / workers.count
        self.step += 1
        if math.isfinite(mean) and math.isfinite(norm):
            self.optimizer.step()
            self.schedule.step()
            if self.average is not None:
                self.average.update_parameters(self._children)
        self.optimizer.zero_grad()
        return mean, norm, n_stopped > 0

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The task's figures with the averaged weights."""
        with self.averaged():
            self.task.eval()
            return self.task.evaluate()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Puts the averaged models into the task, for as long as the context lasts."""
        average = self._children if self.average is None else self.average.module
        try:
            for name, model in average.items():
                setattr(self.task, name, model)
            yield
        finally:
            for name, model in self._children.items():
                setattr(self.task, name, model)

    def save(self, path: Path) -> None:
        """Writes what a resumed run needs. A reader sees the new file whole, or the old one.

        Raises RecycleError where weights are not finite, and WriteError where the file cannot be written.
        """
        if not all(bool(value.isfinite().all()) for value in self.task.parameters()):
            raise RecycleError(f"training: a weight is not finite after step {self.step}; {self.kept()}. {_SMALLER}")
        if self.workers.is_leader:
            state = {
                "trained": self.task.state_dict(),
                "average": None if self.average is None else self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "step": self.step,
                "arguments": self.arguments,
            }
            # Through a stream of Python's: torch's own gives no reason where it fails.
            with whole_file(path) as part, part.open("wb") as stream:
                torch.save(state, stream)
        self.saved = (path, self.step)

    def kept(self) -> str:
        """What there is to go on from, for a message."""
        if self.saved is None:
            return "no state was saved yet"
        return "{} has the state after step {}".format(*self.saved)

    def restore(self, path: Path, state: dict[str, Any]) -> None:
        """Continues from save(). state: as ``read_state`` returns. Raises RecycleError for one that does not fit."""
        shapes = {name: getattr(value, "shape", None) for name, value in state["trained"].items()}
        for name, value in self.task.state_dict().items():
            if shapes.get(name) != value.shape:
                raise RecycleError(f"--resume: {path} is of a module of another shape ({name})")
        try:
            self.task.load_state_dict(state["trained"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.step = int(state["step"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise RecycleError(f"--resume: {path} is damaged ({str(error).splitlines()[0]})") from None
        self.saved = (path, self.step)

    def run(self, checkpoint: Path, stop: Callable[[], bool] = lambda: False) -> Iterator[TrainStep]:
        """Trains to the last step, saves to ``checkpoint`` on the way, and yields each step.

        stop: whether to end after the step in progress; the state is then saved and KeyboardInterrupt raised. Raises
        RecycleError at the first nonfinite loss or gradient; the checkpoint then holds the last finite state saved.
        """
        options = self.options
        saved = time.monotonic()
        while self.step < options.steps:
            rate = self.schedule.get_last_lr()[0]
            loss, norm, is_stopped = self.train_step(stop)
            for name, value in (("loss", loss), ("norm of the gradient", norm)):
                if not math.isfinite(value):
                    raise RecycleError(
                        f"training: the {name} is {value} at step {self.step}; {self.kept()}. {_SMALLER}"
                    )
            is_last = self.step == options.steps
            is_measured = is_last or self.step % options.evaluate_every == 0
            is_due = time.monotonic() - saved > options.save_seconds
            # Before the first figures too: they are logged, and the log is never without its state.
            if is_last or is_stopped or is_due or (is_measured and self.saved is None):
                self.save(checkpoint)
                saved = time.monotonic()
            if is_stopped:
                raise KeyboardInterrupt
            yield TrainStep(self.step, loss, rate, self.evaluate() if is_measured else None)
