"""Trains a recyclable module.

    python -m recycle_ext.train --output DIR                          the default base, on its own text
    python -m recycle_ext.train --base MODEL --text FILE... --output DIR
    python -m recycle_ext.train --joint CONFIG.json --text FILE... --output DIR

The base is frozen (train/frozen.py), or trained from scratch too, as in the paper (train/joint.py).
Several processes: `torchrun --nproc-per-node N -m recycle_ext.train ...`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from recycle_ext.command_line import exit_status
from recycle_ext.errors import RecycleError
from recycle_ext.train.log import Log, screen_line
from recycle_ext.train.options import check_options, parse_arguments, train_options
from recycle_ext.train.tasks import frozen_task, joint_task
from recycle_ext.train.trainer import Trainer, TrainStep
from recycle_ext.train.workers import Workers, join, leave


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    return exit_status(lambda: run(parse_arguments(arguments)))


def run(options: argparse.Namespace) -> int:
    """Trains in this process, one of torchrun's or the only one, and prints the final figures."""
    check_options(options)
    workers = join(options.device)
    try:
        figures = train(options, workers)
    except KeyboardInterrupt:
        print(f"stopped; go on with --resume --output {options.output}", file=sys.stderr)
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise RecycleError(
            "out of memory; a larger --accumulate, a smaller --batch-sequences or --length takes "
            f"less, and --online for the states ({str(error).splitlines()[0]})"
        ) from None
    finally:
        leave(workers)
    if workers.is_leader:
        print(f"{options.output}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()))
    return 0


def train(options: argparse.Namespace, workers: Workers) -> dict[str, float]:
    """The whole run; returns the figures on the held-out sequences."""

    def tell(line: str) -> None:
        if workers.is_leader:
            tqdm.write(line, sys.stderr)

    folder = output_folder(options, workers)
    task = joint_task(options, folder, workers) if options.joint else frozen_task(options, folder, workers, tell)
    trainer = Trainer(task, train_options(options), workers)
    checkpoint = folder / "training.pt"
    if checkpoint.exists():
        trainer.load(checkpoint)
    n_trained = sum(parameter.numel() for parameter in task.parameters())
    tell(f"{n_trained / 1e6:.2f} million parameters; {task.n_train} sequences of {options.length} tokens")
    log = Log(folder, trainer.step) if workers.is_leader else None
    figures: dict[str, float] = {}
    steps: list[TrainStep] = []  # since the last row of the log
    started = time.monotonic()
    with tqdm(
        total=options.steps, initial=trainer.step, desc="training", unit=" steps", disable=not workers.is_leader
    ) as bar:
        for step in trainer.run(checkpoint):
            bar.update()
            steps.append(step)
            if step.figures is None:
                continue
            figures = step.figures
            step_tokens = options.batch_sequences * options.length
            row = log_row(steps, step_tokens, time.monotonic() - started)
            if log is not None:
                log.add(row)
            tell(screen_line(row))
            steps, started = [], time.monotonic()
    if log is not None:
        with trainer.averaged():
            task.save(folder)
        if len(log.rows) > 1 and log.plot() is None:
            tell("no plot: it needs matplotlib (`pip install matplotlib`)")
    figures = figures or trainer.evaluate()
    workers.wait()  # A process that leaves while another works can make that one abort.
    return figures


def output_folder(options: argparse.Namespace, workers: Workers) -> Path:
    """Creates the output directory. Raises RecycleError where it has another run's state, or none to resume."""
    folder = Path(options.output)
    state = folder / "training.pt"
    if state.exists() and not options.resume:
        raise RecycleError(f"{state} is of an earlier run: give --resume, or another --output")
    if options.resume and not folder.is_dir():
        raise RecycleError(f"--resume: there is no {folder}")
    workers.wait()  # All processes look before one of them creates the directory.
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecycleError(f"--output {folder}: {error.strerror}") from None
    return folder


def log_row(steps: Sequence[TrainStep], step_tokens: int, seconds: float) -> dict[str, Any]:
    """A row of the log (log.Log.add) for some steps, the last of which has figures."""
    last = steps[-1]
    return {
        "step": last.number,
        "loss": sum(step.loss for step in steps) / len(steps),
        **(last.figures or {}),
        "learning_rate": last.learning_rate,
        "tokens_per_second": len(steps) * step_tokens / seconds,
    }


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed; torch's CPU allocator raises a plain RuntimeError."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or "can't allocate memory" in str(error) or "not enough memory" in str(error)


if __name__ == "__main__":
    sys.exit(main())
