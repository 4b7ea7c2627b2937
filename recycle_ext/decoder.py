"""The decoding state and the loop around torch.ops.recycle.prefill and decode_step."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from recycle_ext import _C
from recycle_ext.draft_policy import DraftPolicy, Experience
from recycle_ext.errors import RecycleError
from recycle_ext.gpu_prefill import Plan
from recycle_ext.graphed_step import GraphedStep
from recycle_ext.kv_cache import CACHE_DTYPES, row_elements
from recycle_ext.packing import PackedModel

MODES = {"standard": 0, "verify": 1, "alternate": 2}
AUTO = "auto"


def check_drafts(drafts: int | str) -> None:
    """Raises RecycleError unless it is 1 to 4 or "auto"."""
    if drafts != AUTO and not (isinstance(drafts, int) and 1 <= drafts <= _C.MAX_DRAFTS):
        raise RecycleError(f"drafts is {drafts!r}; it must be 1 to {_C.MAX_DRAFTS}, or {AUTO}")


class Decoder:
    """Decodes a batch of sequences with one set of weights.

    All state is in tensors, which the ops write to: base_cache and module_cache [layers, 2, batch,
    n_kv_heads, capacity, head_dim] of ``cache_dtype`` (float32, bfloat16 or int8; head_dim + 4 in int8,
    where the row's scale follows), pending [batch, drafts + 1] int64, lengths [2, batch]
    int64 (positions in the base's cache, and in the module's).

    Where the model's weights are, on the CPU or a GPU, there is all state, and there it runs. On a GPU the cache
    is float32 or bfloat16, and a step is one CUDA graph.

    model: from ``packing.pack_model``. mode: "standard" (no module), "verify" (a draft counts if the base
    model would have said it: the output is the base model's own) or "alternate" (drafts always count).
    drafts: 1..4 tokens that the module guesses in a step, or in verify mode "auto": 0..4, as a DraftPolicy chooses
    for each step of ``step``, ``run`` and ``stream`` by what counts and what steps cost, for all sequences alike;
    ``self.drafts`` is what the state holds now. capacity: positions a sequence may have, prompt and new tokens
    together; None: 2048, or the model's context if that is less. temperature 0 is
    greedy; top_k 0 and top_p 1 cut nothing. seeds: one a sequence; a seed's draws depend on nothing else in the batch.
    With "auto" they depend on the clock: what is drawn has the base model's distribution whatever k is, but which
    token a seed gives changes with k.

    Raises RecycleError for arguments out of range.
    """

    def __init__(
        self,
        model: PackedModel,
        mode: str = "verify",
        drafts: int | str = 1,
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
        check_drafts(drafts)
        if drafts == AUTO and mode == "alternate":
            raise RecycleError(
                "drafts is 'auto', which mode 'alternate' can't have: there all drafts count, so their number "
                "decides how good the text is; give 1 to 4, or use verify"
            )
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
        self.policy: DraftPolicy | None = None
        self._most_drafts = drafts
        if mode == "standard":
            self._most_drafts = 0
        elif drafts == AUTO:
            self._most_drafts = _C.MAX_DRAFTS
            self.policy = DraftPolicy(self._experience(batch, temperature == 0))
        self.drafts = self._most_drafts if self.policy is None else self.policy.choose()
        self.batch = batch
        self.capacity = capacity
        greedy = temperature == 0
        # A step looks past the last token that will be kept.
        rows = capacity + _C.positions_needed(self._most_drafts)

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
            cache(model.module_config) if self._most_drafts else torch.empty(0, device=device)
        )
        self.lengths = torch.zeros(2, batch, dtype=torch.int64, device=device)
        # For the widest step; a narrower one's are their first elements.
        self._all_pending = integers(batch * (self._most_drafts + 1))
        self._probs_size = model.draft_vocab_size if mode == "verify" and not greedy else 0
        self._all_draft_probs = torch.empty(
            batch * self._most_drafts * self._probs_size, device=device
        )
        self.pending, self.draft_probs = self._views(self.drafts)
        self.scratch = torch.empty(0, dtype=torch.uint8, device=device)
        self._scratch_threads = 0  # that the scratch has room for
        self._sampling = (
            float(temperature),
            int(top_k),
            float(top_p),
            torch.tensor([seed % 2**63 for seed in seeds], dtype=torch.int64, device=device),
        )
        self._on_gpu = model.weights.is_cuda
        self._graphs: dict[int, GraphedStep] = {}  # by drafts
        self.steps = 0

    def _experience(self, batch: int, greedy: bool) -> Experience:
        """Of this model with such steps, shared by its decoders."""
        kept, key = self.model.experience, (batch, greedy, _C.n_threads())
        return kept.setdefault(key, Experience(_C.MAX_DRAFTS))

    def _views(self, drafts: int) -> tuple[Tensor, Tensor]:
        """pending [batch, drafts + 1] and draft_probs [batch, drafts, draft vocabulary] in what is allocated."""
        pending = (self.batch, drafts + 1)
        probs = (self.batch, drafts, self._probs_size)
        return (
            self._all_pending[: math.prod(pending)].view(pending),
            self._all_draft_probs[: math.prod(probs)].view(probs),
        )

    def set_drafts(self, drafts: int) -> None:
        """Gives the following steps another number of drafts: 0 (standard steps) to what the decoder was made with.

        For verify mode, whose greedy text is the same whatever is changed when. Drafts that are too many are
        forgotten. Where there are too few, a token stands in that is as good as wrong: the next step is a little
        slower for it and the one after it has all its drafts. The module doesn't see what steps without drafts write,
        and goes on after it as if it weren't there.

        Raises RecycleError in other modes and for numbers out of range.
        """
        if self.mode != "verify":
            raise RecycleError(f"mode is {self.mode!r}; drafts can be changed in verify alone")
        if not 0 <= drafts <= self._most_drafts:
            raise RecycleError(f"drafts is {drafts}; it must be 0 to {self._most_drafts}")
        if drafts == self.drafts:
            return
        kept = min(drafts, self.drafts)
        pending, probs = self.pending[:, : kept + 1].clone(), self.draft_probs[:, :kept].clone()
        self.drafts = drafts
        self.pending, self.draft_probs = self._views(drafts)
        self.pending[:, : kept + 1] = pending
        self.pending[:, kept + 1 :] = self._padding
        self.draft_probs[:, :kept] = probs
        # As if the module had been sure of the padding: so the rule for drafts stays exact.
        self.draft_probs[:, kept:] = 0
        self.draft_probs[:, kept:, :1] = 1

    @functools.cached_property
    def _padding(self) -> int:
        """The first token that the module can name."""
        if not self.model.module_config.draft_vocab_size:
            return 0
        return int(Plan(self.model.weights, self.model.plan).draft_vocab[0])

    def arguments(self) -> tuple:
        """What both ops take, in the order of their schemas."""
        model = self.model
        if model.weights.is_cuda:
            if not len(self.scratch):
                size = torch.ops.recycle.gpu_scratch_bytes(
                    model.plan,
                    model.weights.numel(),
                    self.batch,
                    self._most_drafts,
                    self._sampling[0] == 0,
                    model.weights.device.index,
                )
                self.scratch = torch.empty(size, dtype=torch.uint8, device=model.weights.device)
        elif (threads := _C.n_threads()) != self._scratch_threads:
            needed = _C.scratch_bytes(
                model.plan.numpy(),
                model.weights.numpy(),
                self.batch,
                self._most_drafts,
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
            MODES[self.mode if self.drafts else "standard"],
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
        without = self.mode == "verify" and not self.drafts
        if without:  # for now; the module is to know the prompt all the same
            self.set_drafts(1)
        torch.ops.recycle.prefill(*self.arguments(), sequence, ids)
        if without:
            self.set_drafts(0)
        return int(self.pending[sequence, 0])

    def step(self) -> tuple[Tensor, Tensor]:
        """One decode step of all sequences that have a prompt.

        Returns tokens [batch, drafts + 1] int64, the new tokens of each sequence, then -1; and counts
        [batch] int64, how many; both on the CPU. drafts: as many as this step had.
        """
        self.steps += 1
        if self._on_gpu:
            graph = self._under_way() or self._start()
            tokens, counts = self._checked(*graph.read())
            seconds = graph.seconds
        else:
            self._follow_policy()
            begin = time.perf_counter()
            tokens, counts = torch.ops.recycle.decode_step(*self.arguments())
            seconds = time.perf_counter() - begin
        if self.policy is not None:
            accepted = [count - 1 for count in counts.tolist() if count > 0]
            if accepted:
                self.policy.observe(tokens.shape[1] - 1, accepted, seconds)
        return tokens, counts

    def run(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What ``step`` returns, step after step, as long as it is asked for.

        On a GPU the next step is started before one is read, so that it needn't wait for who reads; the state
        is then a step further than what was returned. Before steps of another number of drafts, all are read.
        """
        while True:
            if self._on_gpu:
                while self._may_start():
                    self._start()
            yield self.step()

    def _follow_policy(self) -> None:
        if self.policy is not None:
            self.set_drafts(self.policy.choose())

    def _may_start(self) -> bool:
        """Whether another step can be started before those that were are read."""
        graph = self._under_way()
        if graph is None:
            return True
        wanted = self.drafts if self.policy is None else self.policy.choose()
        return graph.under_way < 2 and graph is self._graphs.get(wanted)

    def _start(self) -> GraphedStep:
        self._follow_policy()
        graph = self.capture()
        graph.start()
        return graph

    def _under_way(self) -> GraphedStep | None:
        """The one with steps that were started and not read; there never are two."""
        return next((graph for graph in self._graphs.values() if graph.under_way), None)

    def capture(self) -> GraphedStep:
        """The graph of a step with ``drafts``, on a GPU; made at the first call, which takes a fraction of a second."""
        if self.drafts not in self._graphs:
            self._graphs[self.drafts] = GraphedStep(self.arguments())
        return self._graphs[self.drafts]

    def _checked(self, tokens: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """A GPU can't raise; it says so in counts (csrc/cuda/sequence.h)."""
        for sequence, count in enumerate(counts.tolist()):
            if count == -1:
                raise RuntimeError(
                    f"decode_step: a logit is NaN or infinite (sequence {sequence}, "
                    f"position {int(self.lengths[0, sequence])} or one of its drafts)"
                )
            if count < 0:
                raise ValueError(
                    f"decode_step: sequence {sequence} has no room for another step, or a pending token "
                    "that is none"
                )
        return tokens, counts

    def room(self, sequence: int = 0) -> int:
        """Tokens a sequence may still grow by."""
        return self.capacity - int(self.lengths[0, sequence]) - 1

    def release(self, sequence: int) -> None:
        """Ends a sequence: steps leave it out until the next prefill."""
        self._forget_steps(sequence)
        self.pending[sequence] = -1

    def _forget_steps(self, sequence: int) -> None:
        """What was started ahead belongs to the text before."""
        for graph in self._graphs.values():
            graph.forget(sequence)

    def stream(self, prompt: Sequence[int]) -> Iterator[int]:
        """Token ids after the prompt, one by one, until the capacity is reached (batch 1)."""
        yield self.prefill(prompt)
        room = self.room()
        for tokens, counts in self.run() if room > 0 else ():
            yield from tokens[0, : min(int(counts[0]), room)].tolist()
            room -= int(counts[0])
            if room <= 0:
                return
