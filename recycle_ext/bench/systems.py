"""Systems under measurement load a model once, then prefill and decode under a clock. ``Ours`` is recycle_ext."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

from recycle_ext import _C
from recycle_ext.bench.runners import Job, growth
from recycle_ext.decoding.decoder import AUTO, Decoder
from recycle_ext.decoding.kv_cache import CACHE_DTYPES
from recycle_ext.decoding.step import Step
from recycle_ext.generate.model import load


@dataclass(frozen=True)
class Decoded:
    """A timed decoding of all sequences together.

    tokens: the requested ones; draft tokens past the last of them are not counted. cache_bytes: keys and values that a
    step reads, on average. step_bytes: weights that a step reads, on average; None: as the system says.
    acceptance_rate: accepted draft tokens / all of them, those after a rejected one included (eval leaves those out); None
    without draft tokens.
    """

    seconds: float
    steps: int
    tokens: int
    cache_bytes: float
    step_bytes: float | None = None
    acceptance_rate: float | None = None


class System(Protocol):
    """A loaded model.

    weight_bytes: in memory. step_bytes: weights that a decode step reads, the minimum if the number changes.
    standard_step_bytes: the same without a module. formats: of the weights, for humans.
    """

    weight_bytes: int
    step_bytes: int
    standard_step_bytes: int
    formats: str

    def prefill(self, ids: Sequence[int]) -> float:
        """Seconds from a prompt (token ids) to its first new token."""

    def decode(self, new_tokens: int) -> Decoded:
        """Decodes ``new_tokens`` per sequence greedily after the job's sequences, past any end token."""


class Ours:
    """recycle_ext."""

    def __init__(self, job: Job) -> None:
        self._job = job
        dtype = job.runner.dtype
        self._model = load(
            job.model,
            job.module or "none",
            dtype=None if dtype == "native" else dtype,
            threads=job.runner.threads,
            module_dtype=job.module_dtype,
        )
        packed = self._model.packed
        self.weight_bytes = packed.weights.numel()
        drafts = job.runner.drafts
        self.step_bytes = packed.step_bytes(0 if drafts == AUTO else drafts)
        self.standard_step_bytes = packed.step_bytes(0)
        self.formats = packed.formats

    def _decoder(self, batch: int, capacity: int) -> Decoder:
        runner = self._job.runner
        return Decoder(
            self._model.packed,
            mode=runner.mode,
            drafts=runner.drafts or 1,
            batch=batch,
            capacity=capacity,
            cache_dtype=CACHE_DTYPES.get(self._job.cache_dtype, self._model.cache_dtype),
        )

    def prefill(self, ids: Sequence[int]) -> float:
        """Seconds from a prompt to its first new token; the first draft tokens are ready by then too."""
        decoder = self._decoder(1, len(ids) + 1)
        start = time.perf_counter()
        decoder.prefill(ids)
        return time.perf_counter() - start

    def decode(self, new_tokens: int) -> Decoded:
        """Decodes until the sequences have ``new_tokens`` each on average."""
        return self._run(self._prefilled(new_tokens), new_tokens)

    def _prefilled(self, new_tokens: int) -> Decoder:
        """A decoder with the job's sequences in its caches."""
        sequences, num_draft_tokens = self._job.sequences, self._job.runner.max_draft_tokens
        longest = max(map(len, sequences))
        decoder = self._decoder(len(sequences), longest + growth(new_tokens, len(sequences), num_draft_tokens))
        for index, ids in enumerate(sequences):
            decoder.prefill(ids, index)
        return decoder

    def _run(self, decoder: Decoder, new_tokens: int) -> Decoded:
        wanted = left = decoder.batch * new_tokens
        positions_before = int(decoder.lengths[0].sum())
        steps: list[Step] = []
        records = decoder.run()
        start = time.perf_counter()
        while left > 0:
            steps.append(next(records))
            steps[-1].check()
            left -= int(steps[-1].counts.sum())
        # The clock of the caller, not Step.seconds: choosing the number of draft tokens takes time too.
        seconds = time.perf_counter() - start

        drafted, accepted = count_draft_tokens(steps, wanted)
        num_draft_tokens = sum(step.drafted for step in steps) / len(steps)  # of a step, on average
        # A step reads the base model's cache once, and the module's cache once per draft token.
        position_bytes = decoder.base_cache[:, :, 0, :, 0].nbytes
        if num_draft_tokens:
            position_bytes += num_draft_tokens * decoder.module_cache[:, :, 0, :, 0].nbytes
        positions = (positions_before + int(decoder.lengths[0].sum())) / 2
        packed = self._model.packed
        return Decoded(
            seconds,
            len(steps),
            wanted,
            cache_bytes=positions * position_bytes,
            step_bytes=packed.step_bytes(0) + num_draft_tokens * packed.module_bytes,
            acceptance_rate=accepted / drafted if drafted else None,
        )

    def step_seconds(self, rows: int, steps: int) -> float:
        """Seconds of a step of ``rows`` sequences in standard mode, the median of ``steps``."""
        sequences = self._job.sequences[:rows]
        decoder = self._decoder(rows, max(map(len, sequences)) + steps + 1)
        for index, ids in enumerate(sequences):
            decoder.prefill(ids, index)
        return median_seconds(decoder.step, steps)

    def phases(self) -> list[dict]:
        """Where the time of a decode step goes: microseconds per step of each phase, averaged over the threads.

        "call" is the rest of the step, the time outside the kernels.
        """
        decoder = self._prefilled(self._job.new_tokens)
        _C.profile(True)
        try:
            decoded = self._run(decoder, self._job.new_tokens)
            times = _C.phase_times()
        finally:
            _C.profile(False)
        rows = [(part, phase, count, work, wait) for part, phase, count, work, wait in times]
        rest = decoded.seconds - sum(work + wait for *_, work, wait in rows)
        rows.append(("", "call", decoded.steps, max(rest, 0.0), 0.0))
        return [
            {
                "part": part,
                "phase": phase,
                "times": count / decoded.steps,
                "work_microseconds": work / decoded.steps * 1e6,
                "wait_microseconds": wait / decoded.steps * 1e6,
                "share": (work + wait) / decoded.seconds,
            }
            for part, phase, count, work, wait in rows
        ]


def median_seconds(step: Callable[[], object], count: int) -> float:
    """The median time of ``count`` calls, after one that is not timed."""
    step()
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def count_draft_tokens(steps: Sequence[Step], max_tokens: int) -> tuple[int, int]:
    """(verified, accepted) draft tokens of all sequences, up to the ``max_tokens``-th new token of the batch.

    Within a step the tokens count in the order of the sequences.
    """
    drafted = accepted = 0
    for step in steps:
        for sequence in range(len(step.counts)):
            record = step.sequence(sequence).cut(max_tokens)
            max_tokens -= len(record.tokens)
            drafted += record.drafted
            accepted += record.accepted
    return drafted, accepted
