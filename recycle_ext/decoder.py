"""The decoding state and the loop around torch.ops.recycle.prefill and decode_step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from recycle_ext import _C
from recycle_ext.errors import RecycleError
from recycle_ext.graphed_step import GraphedStep
from recycle_ext.kv_cache import CACHE_DTYPES, row_elements
from recycle_ext.packing import PackedModel

MODES = {"standard": 0, "verify": 1, "alternate": 2}


class Decoder:
    """Decodes a batch of sequences with one set of weights.

    All state is in tensors, which the ops write to: base_cache and module_cache [layers, 2, batch,
    n_kv_heads, capacity, head_dim] of ``cache_dtype`` (float32, bfloat16 or int8; head_dim + 4 in int8,
    where the row's scale follows), pending [batch, drafts + 1] int64, lengths [batch]
    int64 (positions in the caches).

    Where the model's weights are, on the CPU or a GPU, there is all state, and there it runs. On a GPU the cache
    is float32 or bfloat16, and a step is one CUDA graph.

    model: from ``packing.pack_model``. mode: "standard" (no module), "verify" (a draft counts if the base
    model would have said it: the output is the base model's own) or "alternate" (drafts always count).
    drafts: 1..4 tokens that the module guesses in a step. capacity: positions a sequence may have,
    prompt and new tokens together; None: 2048, or the model's context if that is less. temperature 0 is
    greedy; top_k 0 and top_p 1 cut nothing. seeds: one a sequence; a seed's draws depend on nothing else in the batch.

    Raises RecycleError for arguments out of range.
    """

    def __init__(
        self,
        model: PackedModel,
        mode: str = "verify",
        drafts: int = 1,
        batch: int = 1,
        capacity: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seeds: Sequence[int] | None = None,
        cache_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        if mode not in MODES:
            raise RecycleError(f"mode is {mode!r}; it must be one of {', '.join(MODES)}")
        if mode != "standard" and model.module_config is None:
            raise RecycleError(f"mode is {mode!r}, which needs a module, and none is loaded")
        if not 1 <= drafts <= _C.MAX_DRAFTS:
            raise RecycleError(f"drafts is {drafts}; it must be 1 to {_C.MAX_DRAFTS}")
        most = model.config.max_position_embeddings
        if capacity is None:
            capacity = min(2048, most)
        if not 1 <= capacity <= most:
            raise RecycleError(f"capacity is {capacity}; this model's context has 1 to {most}")
        if seeds is None:
            seeds = range(batch)
        if batch < 1 or len(seeds) != batch:
            raise RecycleError(f"batch is {batch} and there are {len(seeds)} seeds")
        if cache_dtype not in CACHE_DTYPES.values():
            raise RecycleError(
                f"cache_dtype is {cache_dtype}; it must be float32, bfloat16 or int8"
            )
        device = model.weights.device
        if device.type == "cuda" and cache_dtype == torch.int8:
            raise RecycleError("cache_dtype is int8; on a GPU it must be float32 or bfloat16")
        if not 0 <= temperature < math.inf:
            raise RecycleError(
                f"temperature is {temperature}; it must be 0 (greedy) or a positive number"
            )
        if not 0 <= top_k < 2**63:
            raise RecycleError(f"top_k is {top_k}; it must be 0 (all tokens) or positive")
        if not 0 < top_p <= 1:
            raise RecycleError(f"top_p is {top_p}; it must be in (0, 1]")
        self.model = model
        self.mode = mode
        self.drafts = 0 if mode == "standard" else drafts
        self.batch = batch
        self.capacity = capacity
        greedy = temperature == 0
        # A step looks past the last token that will be kept.
        rows = capacity + _C.positions_needed(self.drafts)

        def cache(config) -> Tensor:
            size = row_elements(cache_dtype, config.head_dim)
            shape = (config.n_layers, 2, batch, config.n_kv_heads, rows, size)
            zeros = torch.zeros(shape, dtype=cache_dtype, device=device)
            if device.type == "cpu":
                # Zeros from the system are not written yet, so that it can still choose the pages.
                _C.use_huge_pages(zeros.view(torch.uint8).numpy())
            return zeros

        def integers(*shape: int) -> Tensor:
            return torch.full(shape, -1, dtype=torch.int64, device=device)

        self.base_cache = cache(model.config)
        self.module_cache = (
            cache(model.module_config) if self.drafts else torch.empty(0, device=device)
        )
        self.pending = integers(batch, self.drafts + 1)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        sampled_verify = mode == "verify" and not greedy
        self.draft_probs = torch.empty(
            (batch, drafts, model.draft_vocab_size) if sampled_verify else 0, device=device
        )
        self.scratch = torch.empty(0, dtype=torch.uint8, device=device)
        self._scratch_threads = 0  # that the scratch has room for
        self._sampling = (
            float(temperature),
            int(top_k),
            float(top_p),
            torch.tensor([seed % 2**63 for seed in seeds], dtype=torch.int64, device=device),
        )
        self._graph: GraphedStep | None = None
        self.steps = 0

    def arguments(self) -> tuple:
        """What both ops take, in the order of their schemas."""
        model = self.model
        if model.weights.is_cuda:
            if not len(self.scratch):
                size = torch.ops.recycle.gpu_scratch_bytes(
                    model.plan,
                    model.weights.numel(),
                    self.batch,
                    self.drafts,
                    self._sampling[0] == 0,
                    model.weights.device.index,
                )
                self.scratch = torch.empty(size, dtype=torch.uint8, device=model.weights.device)
        elif (threads := _C.n_threads()) != self._scratch_threads:
            needed = _C.scratch_bytes(
                model.plan.numpy(),
                model.weights.numpy(),
                self.batch,
                self.drafts,
                self._sampling[0] == 0,
            )
            self.scratch = torch.empty(needed, dtype=torch.uint8)
            self._scratch_threads = threads
        return (
            model.weights,
            model.plan,
            self.base_cache,
            self.module_cache,
            self.pending,
            self.lengths,
            self.draft_probs,
            self.scratch,
            MODES[self.mode],
            *self._sampling,
        )

    def prefill(self, prompt: Sequence[int], sequence: int = 0) -> int:
        """Reads a prompt (token ids) into ``sequence``, from its start; returns the first new token."""
        if len(prompt) >= self.capacity:
            raise RecycleError(
                f"the prompt has {len(prompt)} tokens; there is room for {self.capacity}, "
                "new tokens included"
            )
        self._forget_steps(sequence)
        ids = torch.tensor(prompt, dtype=torch.int64, device="cpu")
        torch.ops.recycle.prefill(*self.arguments(), sequence, ids)
        return int(self.pending[sequence, 0])

    def step(self) -> tuple[Tensor, Tensor]:
        """One decode step of all sequences that have a prompt.

        Returns tokens [batch, drafts + 1] int64, the new tokens of each sequence, then -1; and counts
        [batch] int64, how many; both on the CPU.
        """
        self.steps += 1
        if not self.model.weights.is_cuda:
            return torch.ops.recycle.decode_step(*self.arguments())
        graph = self.capture()
        if not graph.under_way:
            graph.start()
        return self._checked(*graph.read())

    def run(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What ``step`` returns, step after step, as long as it is asked for.

        On a GPU the next step is started before one is read, so that it needn't wait for who reads; the state
        is then a step further than what was returned.
        """
        while True:
            if self.model.weights.is_cuda:
                graph = self.capture()
                while graph.under_way < 2:
                    graph.start()
            yield self.step()

    def capture(self) -> GraphedStep:
        """The step's graph, on a GPU; made at the first call, which takes a fraction of a second."""
        if self._graph is None:
            self._graph = GraphedStep(self.arguments())
        return self._graph

    def _checked(self, tokens: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """A GPU can't raise; it says so in counts (csrc/cuda/sequence.h)."""
        for sequence, count in enumerate(counts.tolist()):
            if count == -1:
                raise RuntimeError(
                    f"decode_step: a logit is NaN or infinite (sequence {sequence}, "
                    f"position {int(self.lengths[sequence])} or one of its drafts)"
                )
            if count < 0:
                raise ValueError(
                    f"decode_step: sequence {sequence} has no room for another step, or a pending token "
                    "that is none"
                )
        return tokens, counts

    def room(self, sequence: int = 0) -> int:
        """Tokens a sequence may still grow by."""
        return self.capacity - int(self.lengths[sequence]) - 1

    def release(self, sequence: int) -> None:
        """Ends a sequence: steps leave it out until the next prefill."""
        self._forget_steps(sequence)
        self.pending[sequence] = -1

    def _forget_steps(self, sequence: int) -> None:
        """What was started ahead belongs to the text before."""
        if self._graph is not None:
            self._graph.forget(sequence)

    def stream(self, prompt: Sequence[int]) -> Iterator[int]:
        """Token ids after the prompt, one by one, until the capacity is reached (batch 1)."""
        yield self.prefill(prompt)
        room = self.room()
        for tokens, counts in self.run() if room > 0 else ():
            yield from tokens[0, : min(int(counts[0]), room)].tolist()
            room -= int(counts[0])
            if room <= 0:
                return
