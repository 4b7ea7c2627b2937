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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from recycle_ext.command_line import exit_status
from recycle_ext.errors import RecycleError
from recycle_ext.files import WriteError, make_directory
from recycle_ext.train.interruption import Interruption
from recycle_ext.train.log import Log, screen_line
from recycle_ext.train.options import check_options, parse_arguments, train_options
from recycle_ext.train.record import Record, check_folder, read_state
from recycle_ext.train.tasks import frozen_task, joint_task
from recycle_ext.train.trainer import Trainer, TrainStep
from recycle_ext.train.workers import Workers, join, leave


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    with torch_defaults():
        return exit_status(lambda: run(parse_arguments(arguments)))


@contextmanager
def torch_defaults() -> Iterator[None]:
    """torch's default dtype and device as torch has them, whatever the calling program has set.

    Models, optimizer and schedule are made by libraries that use the defaults.
    """
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def run(options: argparse.Namespace) -> int:
    """Trains in this process, one of torchrun's or the only one, and prints the final figures."""
    check_options(options)
    workers = join(options.device)
    try:
        figures = train(options, workers)
    except (KeyboardInterrupt, SystemExit):  # the second: SIGTERM
        if workers.is_leader:
            print(stopped(Path(options.output)), file=sys.stderr)
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


def stopped(folder: Path) -> str:
    """The last line of an interrupted run: what is kept, and how to go on."""
    if (folder / "training.pt").exists():
        return f"stopped; go on with --resume --output {folder}"
    return f"stopped before a step was saved; the same command begins anew, and uses text and states in {folder}"


def train(options: argparse.Namespace, workers: Workers) -> dict[str, float]:
    """The whole run; returns the figures on the held-out sequences."""

    def tell(line: str) -> None:
        if workers.is_leader:
            tqdm.write(line, sys.stderr)

    folder = Path(options.output)
    record = open_record(options, folder, workers)
    if options.joint:
        task = joint_task(options, workers, record)
    else:
        task = frozen_task(options, folder, workers, record, tell)
    trainer = Trainer(task, train_options(options), workers, record.arguments)
    if record.state is not None:
        trainer.restore(record.file, record.state)
        record.state = None  # frees its memory
    make_directory(folder)
    n_trained = sum(parameter.numel() for parameter in task.parameters())
    tell(f"{n_trained / 1e6:.2f} million parameters; {task.n_train} sequences of {options.length} tokens")
    try:
        figures = steps_and_models(options, workers, trainer, folder, tell)
    except WriteError as error:
        raise RecycleError(f"{error}; {trainer.kept()}") from None
    workers.wait()  # A process that leaves while another works can make that one abort.
    return figures


def steps_and_models(
    options: argparse.Namespace, workers: Workers, trainer: Trainer, folder: Path, tell: Callable[[str], None]
) -> dict[str, float]:
    """Trains, logs and saves the models; returns the figures on the held-out sequences."""
    log = Log(folder, trainer.step) if workers.is_leader else None
    figures: dict[str, float] = {}
    steps: list[TrainStep] = []  # since the last row of the log
    step_tokens = options.batch_sequences * options.length
    started = time.monotonic()
    bar = tqdm(total=options.steps, initial=trainer.step, desc="training", unit=" steps", disable=not workers.is_leader)
    with bar, Interruption(lambda: tell("stopping after this step; Ctrl-C again stops at once")) as interruption:
        for step in trainer.run(folder / "training.pt", interruption.is_requested):
            bar.update()
            steps.append(step)
            if step.figures is None:
                continue
            figures = step.figures
            row = log_row(steps, step_tokens, time.monotonic() - started)
            if log is not None:
                log.add(row)
            tell(screen_line(row))
            steps, started = [], time.monotonic()
    if log is not None:
        with trainer.averaged():
            trainer.task.save(folder)
        if len(log.rows) > 1 and log.plot() is None:
            tell("no plot: it needs matplotlib (`pip install matplotlib`)")
    return figures or trainer.evaluate()


def open_record(options: argparse.Namespace, folder: Path, workers: Workers) -> Record:
    """The record of a new run, or of the one to resume. Writes nothing.

    Raises RecycleError where a new run would replace files, and where the run to resume has no state or other options.
    """
    file = folder / "training.pt"
    if options.resume:
        if not file.exists():
            raise RecycleError(f"--resume: there is no {file}")
    elif file.exists():
        raise RecycleError(f"{file} is of an earlier run: give --resume, or another --output")
    else:
        check_folder(folder, bool(options.joint))
    record = Record(file, read_state(file) if options.resume else None)
    record.add_options(options)
    workers.wait()  # All processes look before one of them writes.
    return record


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
