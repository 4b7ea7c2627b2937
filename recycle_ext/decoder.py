"""The decoding state and the loop around torch.ops.recycle.prefill and decode_step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from recycle_ext import _C
from recycle_ext.errors import RecycleError
from recycle_ext.kv_cache import CACHE_DTYPES, row_elements
from recycle_ext.packing import PackedModel

MODES = {"standard": 0, "verify": 1, "alternate": 2}


class Decoder:
    """Decodes a batch of sequences with one set of weights.

    All state is in tensors, which the ops write to: base_cache and module_cache [layers, 2, batch,
    n_kv_heads, capacity, head_dim] of ``cache_dtype`` (float32, bfloat16 or int8; head_dim + 4 in int8,
    where the row's scale follows), pending [batch, drafts + 1] int64, lengths [batch]
    int64 (positions in the caches).

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
            # Zeros from the system are not written yet, so that it can still choose the pages.
            zeros = torch.zeros(shape, dtype=cache_dtype)
            _C.use_huge_pages(zeros.view(torch.uint8).numpy())
            return zeros

        def integers(*shape: int) -> Tensor:
            return torch.full(shape, -1, dtype=torch.int64)

        self.base_cache = cache(model.config)
        self.module_cache = cache(model.module_config) if self.drafts else torch.empty(0)
        self.pending = integers(batch, self.drafts + 1)
        self.lengths = torch.zeros(batch, dtype=torch.int64)
        sampled_verify = mode == "verify" and not greedy
        self.draft_probs = torch.empty(
            (batch, drafts, model.draft_vocab_size) if sampled_verify else 0
        )
        self.scratch = torch.empty(0, dtype=torch.uint8)
        self._scratch_threads = 0  # that the scratch has room for
        self._sampling = (
            float(temperature),
            int(top_k),
            float(top_p),
            torch.tensor([seed % 2**63 for seed in seeds], dtype=torch.int64),
        )
        self.steps = 0

    def arguments(self) -> tuple:
        """What both ops take, in the order of their schemas."""
        model = self.model
        if (threads := _C.n_threads()) != self._scratch_threads:
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
        torch.ops.recycle.prefill(
            *self.arguments(), sequence, torch.tensor(prompt, dtype=torch.int64)
        )
        return int(self.pending[sequence, 0])

    def step(self) -> tuple[Tensor, Tensor]:
        """One decode step of all sequences that have a prompt.

        Returns tokens [batch, drafts + 1] int64, the new tokens of each sequence, then -1; and counts
        [batch] int64, how many.
        """
        tokens, counts = torch.ops.recycle.decode_step(*self.arguments())
        self.steps += 1
        return tokens, counts

    def room(self, sequence: int = 0) -> int:
        """Tokens a sequence may still grow by."""
        return self.capacity - int(self.lengths[sequence]) - 1

    def release(self, sequence: int) -> None:
        """Ends a sequence: steps leave it out until the next prefill."""
        self.pending[sequence] = -1

    def stream(self, prompt: Sequence[int]) -> Iterator[int]:
        """Token ids after the prompt, one by one, until the capacity is reached (batch 1)."""
        yield self.prefill(prompt)
        while (room := self.room()) > 0:
            tokens, counts = self.step()
            yield from tokens[0, : min(int(counts[0]), room)].tolist()
