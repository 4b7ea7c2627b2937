"""Interleaved runs: all workers are loaded first, then run in turns, so that noise hits all runners alike."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from recycle_ext import _C
from recycle_ext.bench import worker
from recycle_ext.bench.runners import OURS, Job
from recycle_ext.bench.worker import Worker, WorkerDied
from recycle_ext.measuring.interleave import rounds


@dataclass
class RunnerRecord:
    """A runner's job, its worker, and the results so far.

    facts: of the model, known once the worker has loaded it. measurements: one per repeat. failed: the worker died.
    """

    job: Job
    worker: Worker | None = None
    facts: dict = field(default_factory=dict)
    measurements: list[dict] = field(default_factory=list)
    phases: list[dict] | None = None
    failed: bool = False


def run_interleaved(records: Sequence[RunnerRecord], repeats: int, phases: bool) -> bool:
    """Fills in the records; False if Ctrl-C ended the runs early. Only one worker computes at a time."""
    ours = [record for record in records if phases and record.job.runner.system == OURS]
    total = len(records) * (1 + repeats) + len(ours)
    try:
        with tqdm(total=total, unit=" runs", leave=False) as bar:
            load(records, bar)
            for order in rounds(records, repeats):
                for record in order:
                    if answer := ask(record, bar, "measuring", "measure"):
                        record.measurements.append(answer)
            for record in ours:
                if answer := ask(record, bar, "phases of", "phases"):
                    record.phases = answer["phases"]
    except KeyboardInterrupt:
        return False
    finally:
        close(records)
    return True


def close(records: Sequence[RunnerRecord]) -> None:
    """Ends the workers."""
    for record in records:
        if record.worker is not None:
            record.worker.close()


def load(records: Sequence[RunnerRecord], bar: tqdm) -> None:
    """Starts the workers, as many at a time as there are cores, and waits until all have loaded their models."""
    for index, record in enumerate(records):
        for next_record in records[index : index + _C.available_cores()]:
            next_record.worker = next_record.worker or Worker(next_record.job, worker.COMMAND)
        record.facts = ask(record, bar, "loading", None) or {}


def ask(record: RunnerRecord, bar: tqdm, action: str, request: str | dict | None) -> dict | None:
    """The worker's answer to a request (None: to the job); None, and a message, if the worker died."""
    bar.set_description(f"{action} {record.job.runner}")
    answer = None
    if not record.failed:
        try:
            answer = record.worker.ask(request) if request else record.worker.answer()
        except WorkerDied as death:
            record.failed = True
            tqdm.write(f"{record.job.runner} is left out: {death}", file=sys.stderr)
    bar.update()
    return answer
