"""The peers: other engines, measured beside recycle_ext."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recycle_ext.bench.requantize import matrix_bytes
from recycle_ext.bench.runners import OURS, Job
from recycle_ext.bench.systems import Decoded, Ours, System, median_seconds
from recycle_ext.checkpoint.gguf import GgufHeader
from recycle_ext.errors import RecycleError

_CACHE_VALUE_BYTES = 2  # of the peers' caches


def open_system(job: Job) -> System:
    """Loads the job's model into the job's system."""
    systems = {OURS: Ours, "transformers": Transformers, "torch.compile": TorchCompile, "llama.cpp": LlamaCpp}
    return systems[job.runner.system](job)


class _Peer:
    """The base of all peers: no module, and caches of 16 bits."""

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
            cache_bytes=sum(lengths) * self._job.cache_values * _CACHE_VALUE_BYTES,
        )


class Transformers(_Peer):
    """transformers in bfloat16, with its own ``generate`` and cache."""

    def __init__(self, job: Job) -> None:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(job.runner.threads)
        path = Path(job.model)
        is_file = path.is_file()
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent if is_file else path, gguf_file=path.name if is_file else None, dtype=torch.bfloat16
        ).eval()
        # Without an end token, generate neither stops early nor spends time on masking one.
        self._model.generation_config.eos_token_id = None
        embedding = self._model.get_input_embeddings().weight
        tied = self._model.get_output_embeddings().weight is embedding
        matrices = [p for p in self._model.parameters() if p.ndim == 2 and (tied or p is not embedding)]
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
        """Generates ``new_tokens`` per sequence; returns the time at which each was ready."""
        longest = max(map(len, sequences))
        ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):  # generate takes padding on the left
            ids[row, longest - len(sequence) :] = torch.tensor(sequence)
            mask[row, longest - len(sequence) :] = 1
        clock = _Clock()
        self._model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, streamer=clock)
        return clock.stamps[1:]  # the first is the prompt


class _Clock:
    """A streamer for ``generate`` that notes the time of each call."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """The prompt at first, then the new token of each sequence."""
        self.stamps.append(time.perf_counter())

    def end(self) -> None:
        """The end of the generation; nothing to note."""


class TorchCompile(Transformers):
    """transformers' model under ``torch.compile`` with a static cache, one sequence, in a loop of this class.

    The first call compiles for about a minute; the worker makes that call before the timed ones.
    """

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        from transformers import StaticCache

        longest = max(len(job.prompt), len(job.sequences[0]) + job.new_tokens + 1)
        # One cache size for all calls: torch.compile compiles again for another size.
        self._cache = StaticCache(config=self._model.config, max_cache_len=longest + 1)
        self._step = torch.compile(self._model.forward, dynamic=False)

    @torch.no_grad()
    def _stamps(self, sequences: Sequence[Sequence[int]], new_tokens: int) -> list[float]:
        (ids,) = sequences
        self._cache.reset()
        # The prefill is eager: torch.compile would compile again for each length of a prompt.
        token = self._forward(self._model, torch.tensor([ids]), 0)
        stamps = [time.perf_counter()]
        for position in range(len(ids), len(ids) + new_tokens - 1):
            token = self._forward(self._step, token, position)
            stamps.append(time.perf_counter())
        return stamps

    def _forward(self, model: Callable, ids: Tensor, position: int) -> Tensor:
        """The argmax token [1, 1] after ``ids`` [1, n] int64, whose first position is ``position``."""
        logits = model(
            ids,
            past_key_values=self._cache,
            cache_position=torch.arange(position, position + ids.shape[1]),
            logits_to_keep=1,
        ).logits
        return logits[:, -1:].argmax(-1)


class LlamaCpp(_Peer):
    """llama.cpp through llama-cpp-python, with the defaults of that package."""

    def __init__(self, job: Job) -> None:
        import llama_cpp

        super().__init__(job, *matrix_bytes(GgufHeader(Path(job.model))))
        self._library = llama_cpp
        longest = max(len(job.prompt), len(job.sequences[0]) + max(job.new_tokens, len(job.sequences)))
        self._llama = llama_cpp.Llama(
            job.model,
            n_ctx=longest + 1,
            n_threads=job.runner.threads,
            n_threads_batch=job.runner.threads,
            verbose=False,
        )

    def prefill(self, ids: Sequence[int]) -> float:
        """Seconds from a prompt to its first new token."""
        start = time.perf_counter()
        self._llama.reset()
        self._llama.eval(list(ids))
        self._argmax_token()
        return time.perf_counter() - start

    def decode(self, new_tokens: int) -> Decoded:
        """``new_tokens`` after the one that the prefill gives."""
        self._llama.reset()
        self._llama.eval(self._job.sequences[0])
        token = self._argmax_token()
        start = time.perf_counter()
        for _ in range(new_tokens):
            self._llama.eval([token])
            token = self._argmax_token()
        return self._decoded(time.perf_counter() - start, new_tokens)

    def step_seconds(self, rows: int, steps: int) -> float:
        """Seconds of a step of ``rows`` tokens of one sequence, each with its logits; the median of ``steps``."""
        lib, context, ids = self._library, self._llama.ctx, self._job.sequences[0]
        self._llama.reset()
        self._llama.eval(ids)
        batch = lib.llama_batch_init(rows, 0, 1)
        batch.n_tokens = rows
        for i in range(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = ids[i % len(ids)], len(ids) + i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0

        def step() -> None:
            if lib.llama_decode(context, batch):
                raise RecycleError(f"llama.cpp does not decode {rows} rows")
            logits = lib.llama_get_logits(context)
            np.ctypeslib.as_array(logits, shape=(rows, self._llama.n_vocab())).argmax(-1)
            lib.llama_memory_seq_rm(lib.llama_get_memory(context), 0, len(ids), -1)

        try:
            return median_seconds(step, steps)
        finally:
            lib.llama_batch_free(batch)

    def _argmax_token(self) -> int:
        """The greedy next token. Not ``Llama.sample``: that builds a chain of samplers per call (0.5 ms)."""
        logits = self._library.llama_get_logits(self._llama.ctx)
        return int(np.ctypeslib.as_array(logits, shape=(self._llama.n_vocab(),)).argmax())
