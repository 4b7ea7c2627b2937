"""The measuring: all contenders loaded, then taking turns, so that a machine's moods hit all alike."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from tqdm import tqdm

from recycle_ext import _C
from recycle_ext.bench import worker
from recycle_ext.bench.contenders import OURS, Job
from recycle_ext.bench.worker import Worker, WorkerDied

T = TypeVar("T")


@dataclass
class Entry:
    """A contender and what is known of it so far."""

    job: Job
    worker: Worker | None = None
    facts: dict = field(default_factory=dict)  # of the model, once it is loaded
    measurements: list[dict] = field(default_factory=list)
    phases: list[dict] | None = None
    left_out: bool = False


def rounds(entries: Sequence[T], count: int) -> Iterator[list[T]]:
    """A B C, C B A, A B C, ...: drift over time adds as much to the first as to the last."""
    for index in range(count):
        yield list(entries) if index % 2 == 0 else list(entries)[::-1]


def race(entries: Sequence[Entry], repeats: int, phases: bool) -> bool:
    """Fills in the entries; False if Ctrl-C ended it early. Nothing runs beside a measurement."""
    ours = [entry for entry in entries if phases and entry.job.contender.system == OURS]
    total = len(entries) * (1 + repeats) + len(ours)
    try:
        with tqdm(total=total, unit=" runs", leave=False) as bar:
            _load(entries, bar)
            for order in rounds(entries, repeats):
                for entry in order:
                    if answer := _turn(entry, bar, "measuring", "measure"):
                        entry.measurements.append(answer)
            for entry in ours:
                if answer := _turn(entry, bar, "phases of", "phases"):
                    entry.phases = answer["phases"]
    except KeyboardInterrupt:
        return False
    finally:
        for entry in entries:
            if entry.worker is not None:
                entry.worker.close()
    return True


def _load(entries: Sequence[Entry], bar: tqdm) -> None:
    """Starts the workers, as many at a time as there are cores, and waits for all of them."""
    for index, entry in enumerate(entries):
        for soon in entries[index : index + _C.available_cores()]:
            soon.worker = soon.worker or Worker(soon.job, worker.COMMAND)
        entry.facts = _turn(entry, bar, "loading", None) or {}


def _turn(entry: Entry, bar: tqdm, action: str, request: str | None) -> dict | None:
    """The worker's answer to a request (None: to the job). If it died, that is said, and None returned."""
    bar.set_description(f"{action} {entry.job.contender}")
    answer = None
    if not entry.left_out:
        try:
            answer = entry.worker.ask(request) if request else entry.worker.answer()
        except WorkerDied as death:
            entry.left_out = True
            tqdm.write(f"{entry.job.contender} is left out: {death}", file=sys.stderr)
    bar.update()
    return answer
