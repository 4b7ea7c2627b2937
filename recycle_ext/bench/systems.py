"""The systems that are measured. Each loads a model once and then reads prompts and decodes, timed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from recycle_ext import _C
from recycle_ext.bench.contenders import OURS, Job, cache_values, growth
from recycle_ext.bench.same_width import matrix_bytes
from recycle_ext.decoder import Decoder
from recycle_ext.generation import load
from recycle_ext.gguf_file import GgufHeader

_HALF = 2  # bytes of a value in the peers' caches


@dataclass(frozen=True)
class Decoded:
    """A timed decoding, all sequences together."""

    seconds: float
    steps: int
    tokens: int
    cache_bytes: float  # of keys and values that a step read, on average
    acceptance_rate: float | None = None


class System(Protocol):
    """A loaded model."""

    weight_bytes: int  # in memory
    step_bytes: int  # of weights that a decode step reads
    standard_step_bytes: int  # the same without a module
    formats: str  # for humans

    def prefill(self, ids: Sequence[int]) -> float:
        """Seconds from a prompt to its first new token."""

    def decode(self, new_tokens: int) -> Decoded:
        """Decodes greedily after the job's sequences, past any end token."""


def open_system(job: Job) -> System:
    """Loads what the job asks for."""
    systems = {OURS: Ours, "transformers": Transformers, "llama.cpp": LlamaCpp}
    return systems[job.contender.system](job)


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
        )
        packed = self._model.packed
        self.weight_bytes = packed.weights.numel()
        self.step_bytes = packed.step_bytes(job.contender.drafts)
        self.standard_step_bytes = packed.step_bytes(0)
        self.formats = packed.formats

    def _decoder(self, batch: int, capacity: int) -> Decoder:
        contender = self._job.contender
        return Decoder(
            self._model.packed,
            mode=contender.mode,
            drafts=max(1, contender.drafts),
            batch=batch,
            capacity=capacity,
            cache_dtype=self._model.cache_dtype,
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
        sequences, drafts = self._job.sequences, self._job.contender.drafts
        most = max(map(len, sequences)) + growth(new_tokens, len(sequences), drafts)
        decoder = self._decoder(len(sequences), most)
        for index, ids in enumerate(sequences):
            decoder.prefill(ids, index)
        return decoder

    def _run(self, decoder: Decoder, new_tokens: int) -> Decoded:
        before = int(decoder.lengths.sum())
        wanted, tokens, steps = decoder.batch * new_tokens, 0, 0
        start = time.perf_counter()
        while tokens < wanted:
            _, counts = decoder.step()
            tokens += int(counts.sum())
            steps += 1
        seconds = time.perf_counter() - start

        # A step reads the base's cache once and the module's once a draft.
        values = cache_values(decoder.model.config)
        offered = steps * decoder.batch * decoder.drafts
        if decoder.drafts:
            values += decoder.drafts * cache_values(decoder.model.module_config)
        positions = (before + int(decoder.lengths.sum())) / 2
        return Decoded(
            seconds,
            steps,
            tokens,
            cache_bytes=positions * values * decoder.base_cache.element_size(),
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


class _Peer:
    """What the other systems have in common: no module, and caches of 16 bits."""

    def __init__(self, job: Job, step_bytes: int, formats: str) -> None:
        self._job = job
        self.weight_bytes = self.step_bytes = self.standard_step_bytes = step_bytes
        self.formats = formats

    def _decoded(self, seconds: float, steps: int) -> Decoded:
        lengths = [len(ids) + steps / 2 for ids in self._job.sequences]
        return Decoded(
            seconds,
            steps,
            tokens=steps * len(lengths),
            cache_bytes=sum(lengths) * self._job.cache_values * _HALF,
        )


class Transformers(_Peer):
    """transformers in bfloat16, with its own ``generate`` and cache."""

    def __init__(self, job: Job) -> None:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(job.contender.threads)
        path = Path(job.model)
        is_file = path.is_file()
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent if is_file else path,
            gguf_file=path.name if is_file else None,
            dtype=torch.bfloat16,
        ).eval()
        # Then it neither stops at an end token nor spends time on forbidding it.
        self._model.generation_config.eos_token_id = None
        embedding = self._model.get_input_embeddings().weight
        tied = self._model.get_output_embeddings().weight is embedding
        matrices = [
            p for p in self._model.parameters() if p.ndim == 2 and (tied or p is not embedding)
        ]
        step_bytes = sum(p.numel() * p.element_size() for p in matrices)
        super().__init__(job, step_bytes, "bf16")

    def prefill(self, ids: Sequence[int]) -> float:
        """Seconds from a prompt to its first new token."""
        start = time.perf_counter()
        return self._stamps([ids], 1)[0] - start

    def decode(self, new_tokens: int) -> Decoded:
        """``new_tokens`` for each sequence, after the one that the prefill gives."""
        stamps = self._stamps(self._job.sequences, new_tokens + 1)
        return self._decoded(stamps[-1] - stamps[0], len(stamps) - 1)

    @torch.inference_mode()
    def _stamps(self, sequences: Sequence[Sequence[int]], new_tokens: int) -> list[float]:
        """Generates; returns when each of the tokens was there."""
        longest = max(map(len, sequences))
        ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):  # padded on the left, as generate wants it
            ids[row, longest - len(sequence) :] = torch.tensor(sequence)
            mask[row, longest - len(sequence) :] = 1
        clock = _Clock()
        self._model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=new_tokens,
            streamer=clock,
        )
        return clock.stamps[1:]  # the first is the prompt


class _Clock:
    """A streamer for ``generate`` that notes when it is handed tokens."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """The prompt at first, then the new token of each sequence."""
        self.stamps.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


class LlamaCpp(_Peer):
    """llama.cpp through llama-cpp-python, as that package sets it up."""

    def __init__(self, job: Job) -> None:
        import llama_cpp

        super().__init__(job, *matrix_bytes(GgufHeader(Path(job.model))))
        self._library = llama_cpp
        longest = max(len(job.prompt), len(job.sequences[0]) + job.new_tokens)
        self._llama = llama_cpp.Llama(
            job.model,
            n_ctx=longest + 1,
            n_threads=job.contender.threads,
            n_threads_batch=job.contender.threads,
            verbose=False,
        )

    def prefill(self, ids: Sequence[int]) -> float:
        """Seconds from a prompt to its first new token."""
        start = time.perf_counter()
        self._llama.reset()
        self._llama.eval(list(ids))
        self._pick()
        return time.perf_counter() - start

    def decode(self, new_tokens: int) -> Decoded:
        """``new_tokens`` after the one that the prefill gives."""
        self._llama.reset()
        self._llama.eval(self._job.sequences[0])
        token = self._pick()
        start = time.perf_counter()
        for _ in range(new_tokens):
            self._llama.eval([token])
            token = self._pick()
        return self._decoded(time.perf_counter() - start, new_tokens)

    def _pick(self) -> int:
        """The likeliest token, by the short way: ``Llama.sample`` builds a chain of samplers each time (0.5 ms)."""
        logits = self._library.llama_get_logits(self._llama.ctx)
        return int(np.ctypeslib.as_array(logits, shape=(self._llama.n_vocab(),)).argmax())
