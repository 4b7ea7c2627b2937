"""What is measured of a system: it loads a model once and then reads prompts and decodes, timed. And ours."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from recycle_ext import _C
from recycle_ext.bench.contenders import Job, growth
from recycle_ext.decoding.decoder import AUTO, Decoder
from recycle_ext.decoding.kv_cache import CACHE_DTYPES
from recycle_ext.generate.model import load


@dataclass(frozen=True)
class Decoded:
    """A timed decoding, all sequences together."""

    seconds: float
    steps: int
    tokens: int
    cache_bytes: float  # of keys and values that a step read, on average
    step_bytes: float | None = None  # of weights, on average; None: as the system says
    acceptance_rate: float | None = None


class System(Protocol):
    """A loaded model."""

    weight_bytes: int  # in memory
    step_bytes: int  # of weights that a decode step reads, or the least it reads where that changes
    standard_step_bytes: int  # the same without a module
    formats: str  # for humans

    def prefill(self, ids: Sequence[int]) -> float:
        """Seconds from a prompt to its first new token."""

    def decode(self, new_tokens: int) -> Decoded:
        """Decodes greedily after the job's sequences, past any end token."""


class Ours:
    """recycle_ext."""

    def __init__(self, job: Job) -> None:
        self._job = job
        width = job.contender.width
        self._model = load(
            job.model,
            job.module or "none",
            dtype=None if width == "native" else width,
            threads=job.contender.threads,
            module_dtype=job.module_dtype,
        )
        packed = self._model.packed
        self.weight_bytes = packed.weights.numel()
        drafts = job.contender.drafts
        self.step_bytes = packed.step_bytes(0 if drafts == AUTO else drafts)
        self.standard_step_bytes = packed.step_bytes(0)
        self.formats = packed.formats

    def _decoder(self, batch: int, capacity: int) -> Decoder:
        contender = self._job.contender
        return Decoder(
            self._model.packed,
            mode=contender.mode,
            drafts=contender.drafts or 1,
            batch=batch,
            capacity=capacity,
            cache_dtype=CACHE_DTYPES.get(self._job.cache_dtype, self._model.cache_dtype),
        )

    def prefill(self, ids: Sequence[int]) -> float:
        """Seconds from a prompt to its first new token; the first drafts are there too."""
        decoder = self._decoder(1, len(ids) + 1)
        start = time.perf_counter()
        decoder.prefill(ids)
        return time.perf_counter() - start

    def decode(self, new_tokens: int) -> Decoded:
        """Decodes until the sequences have ``new_tokens`` each on average."""
        return self._run(self._ready(new_tokens), new_tokens)

    def _ready(self, new_tokens: int) -> Decoder:
        """A decoder with the job's sequences in its caches."""
        sequences, drafts = self._job.sequences, self._job.contender.most_drafts
        most = max(map(len, sequences)) + growth(new_tokens, len(sequences), drafts)
        decoder = self._decoder(len(sequences), most)
        for index, ids in enumerate(sequences):
            decoder.prefill(ids, index)
        return decoder

    def _run(self, decoder: Decoder, new_tokens: int) -> Decoded:
        before = int(decoder.lengths[0].sum())
        wanted, tokens, steps, drafts = decoder.batch * new_tokens, 0, 0, 0
        start = time.perf_counter()
        while tokens < wanted:
            found, counts = decoder.step()
            tokens += int(counts.sum())
            steps += 1
            drafts += found.shape[1] - 1
        seconds = time.perf_counter() - start

        # A step reads the base's cache once and the module's once a draft.
        position_bytes = decoder.base_cache[:, :, 0, :, 0].nbytes
        offered = drafts * decoder.batch
        if drafts:
            position_bytes += drafts / steps * decoder.module_cache[:, :, 0, :, 0].nbytes
        positions = (before + int(decoder.lengths[0].sum())) / 2
        packed = self._model.packed
        return Decoded(
            seconds,
            steps,
            tokens,
            cache_bytes=positions * position_bytes,
            step_bytes=packed.step_bytes(0) + drafts / steps * packed.module_bytes,
            acceptance_rate=(tokens - steps * decoder.batch) / offered if offered else None,
        )

    def phases(self) -> list[dict]:
        """Where the time of a decode step goes, in microseconds a step, the average thread's.

        What is left of the step after all phases is spent outside of the kernels: "call".
        """
        decoder = self._ready(self._job.new_tokens)
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
