"""The decoding state and the loop around torch.ops.recycle.prefill and decode_step."""

from __future__ import annotations

import dataclasses
import functools
import math
import secrets
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recycle_ext import _C, arguments
from recycle_ext.arguments import shown
from recycle_ext.decoding.cuda_graph import GraphedStep
from recycle_ext.decoding.draft_policy import DraftPolicy, StepHistory
from recycle_ext.decoding.kv_cache import CACHE_DTYPES, row_elements
from recycle_ext.decoding.step import SequenceStep, Step
from recycle_ext.errors import RecycleError, first_line
from recycle_ext.weights.pack import PackedModel
from recycle_ext.weights.plan import read_plan

MODES = {"standard": 0, "verify": 1, "alternate": 2}
AUTO = "auto"
MAX_BATCH = 2**16  # far more sequences than a machine has memory for


class _Settings(NamedTuple):
    """The decoder's arguments as plain values."""

    mode: str
    drafts: int | str
    batch: int
    capacity: int
    temperature: float
    top_k: int
    top_p: float
    seeds: list[int]


def _checked(
    model: PackedModel,
    mode: Any,
    drafts: Any,
    batch: Any,
    capacity: Any,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    seeds: Any,
    cache_dtype: Any,
) -> _Settings:
    """The decoder's arguments. Raises RecycleError for the first that is out of range."""
    if not isinstance(model, PackedModel):
        raise RecycleError(f"model is {shown(model)}; Decoder needs a packed model: load(...).packed")
    mode = arguments.one_of("mode", mode, MODES)
    if mode != "standard" and model.module_config is None:
        raise RecycleError(f"mode is {mode!r}, which needs a module, and none is loaded")
    if not isinstance(drafts, str) or drafts != AUTO:
        drafts = arguments.integer("drafts", drafts, 1, _C.MAX_DRAFTS, f"1 to {_C.MAX_DRAFTS}, or {AUTO}")
    elif mode == "alternate":
        raise RecycleError(
            "drafts is 'auto', which mode 'alternate' can't have: there every draft token is accepted, so their "
            "number decides how good the text is; give 1 to 4, or use verify"
        )
    context = model.config.max_position_embeddings
    if capacity is None:
        capacity = min(2048, context)
    capacity = arguments.integer("capacity", capacity, 1, context, f"in this model's context, 1 to {context}")
    batch = arguments.integer("batch", batch, 1, MAX_BATCH)
    if seeds is None:
        # 53 bits: every reader of JSON keeps them.
        seeds = [secrets.randbits(53) for _ in range(batch)]
    seeds = arguments.integers("seeds", seeds, "integers, one per sequence")
    if len(seeds) != batch:
        raise RecycleError(f"batch is {batch} and there are {len(seeds)} seeds")
    if not isinstance(cache_dtype, torch.dtype) or cache_dtype not in CACHE_DTYPES.values():
        raise RecycleError(f"cache_dtype is {shown(cache_dtype)}; it must be torch's float32, bfloat16 or int8")
    if model.weights.is_cuda and cache_dtype == torch.int8:
        raise RecycleError("cache_dtype is int8; on a GPU it must be float32 or bfloat16")
    needed = "0 (greedy) or a positive number"
    if not 0 <= (given := arguments.number("temperature", temperature, needed)) < math.inf:
        raise RecycleError(f"temperature is {shown(temperature)}; it must be {needed}")
    temperature = given
    top_k = arguments.integer("top_k", top_k, 0, 2**63 - 1, "0 (all tokens) or positive")
    if not 0 < (given := arguments.number("top_p", top_p, "in (0, 1]")) <= 1:
        raise RecycleError(f"top_p is {shown(top_p)}; it must be in (0, 1]")
    return _Settings(mode, drafts, batch, capacity, temperature, top_k, given, seeds)


class Decoder:
    """Decodes a batch of sequences with one set of weights.

    All state is in tensors, which the ops write to, on the device of the model's weights: base_cache and module_cache
    [layers, 2, batch, n_kv_heads, capacity, head_dim] of ``cache_dtype`` (float32, bfloat16 or int8; head_dim + 4 in
    int8, where the row's scale follows), pending [batch, num_draft_tokens + 1] int64, lengths [2, batch] int64
    (positions in the base's cache, and in the module's). On a GPU the cache is float32 or bfloat16, and a step is one
    CUDA graph.

    model: from ``weights.pack.pack_model``. mode: "standard" (no module), "verify" (a draft token is accepted if
    the base model would have produced it: the output is the base model's own) or "alternate" (all are accepted).
    drafts: draft tokens per step, 1 to 4, or in verify mode "auto": 0 to 4, chosen for each step by measured speed,
    for all sequences alike. ``num_draft_tokens`` is what the state holds now. capacity: positions of a sequence, prompt
    and new tokens together; None: 2048, or the model's context if that is less. temperature 0 is greedy; top_k 0 and
    top_p 1 cut nothing. seeds: one per sequence; None: new ones, which the attribute ``seeds`` tells. The draws of a seed
    do not depend on the rest of the batch. With "auto" and a temperature they depend on the clock: the distribution is
    the base model's, but which token a seed gives changes with the number of draft tokens.

    A step on the CPU runs on ``threads`` threads: the model's own number, or the process's where it has none.

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
        mode, drafts, batch, capacity, temperature, top_k, top_p, self.seeds = _checked(
            model, mode, drafts, batch, capacity, temperature, top_k, top_p, seeds, cache_dtype
        )
        self.model, self.mode, self.batch, self.capacity = model, mode, batch, capacity
        self.threads = model.threads or _C.n_threads()
        self.policy: DraftPolicy | None = None
        self.greedy = temperature == 0
        if mode == "standard":
            max_draft_tokens = 0
        elif drafts == AUTO:
            max_draft_tokens = _C.MAX_DRAFTS
            self.policy = DraftPolicy(self._step_history())
        else:
            max_draft_tokens = drafts
        self._max_draft_tokens = max_draft_tokens
        self.num_draft_tokens = max_draft_tokens if self.policy is None else self.policy.choose()
        device = model.weights.device
        self._probs_size = model.draft_vocab_size if mode == "verify" and not self.greedy else 0
        try:
            self._allocate(cache_dtype)
        except (MemoryError, RuntimeError) as error:  # the second: torch's allocator
            raise RecycleError(
                f"no memory for the caches of {batch} x {capacity} tokens: {first_line(error)}"
            ) from None
        self.pending, self.draft_probs = self._views(self.num_draft_tokens)
        self._sampling = (
            temperature,
            top_k,
            top_p,
            torch.tensor([seed % 2**63 for seed in self.seeds], dtype=torch.int64, device=device),
        )
        self._on_gpu = model.weights.is_cuda
        self._graphs: dict[int, GraphedStep] = {}  # by the number of draft tokens
        self.steps = 0

    def _allocate(self, cache_dtype: torch.dtype) -> None:
        """The state and the scratch."""
        model, batch, max_draft_tokens = self.model, self.batch, self._max_draft_tokens
        device = model.weights.device
        self.base_cache = self._new_cache(model.config, cache_dtype)
        self.module_cache = torch.empty(0, dtype=cache_dtype, device=device)
        if max_draft_tokens:
            self.module_cache = self._new_cache(model.module_config, cache_dtype)
        self.lengths = torch.zeros(2, batch, dtype=torch.int64, device=device)
        # Room for the maximum; a step with fewer draft tokens uses the first elements.
        self._all_pending = torch.full((batch * (max_draft_tokens + 1),), -1, dtype=torch.int64, device=device)
        self._all_draft_probs = torch.empty(
            batch * max_draft_tokens * self._probs_size, dtype=torch.float32, device=device
        )
        self.scratch = self._new_scratch()

    def _new_cache(self, config, dtype: torch.dtype) -> Tensor:
        """Zeros for the stack of layers that ``config`` describes."""
        # The last step writes rows past the last accepted token.
        rows = self.capacity + _C.positions_needed(self._max_draft_tokens)
        shape = (config.n_layers, 2, self.batch, config.n_kv_heads, rows, row_elements(dtype, config.head_dim))
        cache = torch.zeros(shape, dtype=dtype, device=self.model.weights.device)
        if cache.is_cpu:
            # The system has not mapped these zeros yet, so it can still choose the size of the pages.
            _C.use_huge_pages(cache.view(torch.uint8).numpy())
        return cache

    def _step_history(self) -> StepHistory:
        """What decoders of this model share, for this batch, sampling and number of threads."""
        return self.model.shared.setdefault((self.batch, self.greedy, self.threads), StepHistory(_C.MAX_DRAFTS))

    def _new_scratch(self) -> Tensor:
        """Workspace of a step: uint8 [threads, bytes], whose rows say how many threads run it; [bytes] on a GPU."""
        model, k = self.model, self._max_draft_tokens
        if not model.weights.is_cuda:
            row = _C.scratch_bytes(model.plan.numpy(), model.weights.numpy(), self.batch, k, self.greedy, self.threads)
            return torch.empty(self.threads, row, dtype=torch.uint8, device="cpu")
        size = torch.ops.recycle.gpu_scratch_bytes(
            model.plan, model.weights.numel(), self.batch, k, self.greedy, model.weights.device.index
        )
        return torch.empty(size, dtype=torch.uint8, device=model.weights.device)

    def _views(self, num_draft_tokens: int) -> tuple[Tensor, Tensor]:
        """pending [batch, n + 1] and draft_probs [batch, n, draft vocabulary], for n draft tokens."""
        pending = (self.batch, num_draft_tokens + 1)
        probs = (self.batch, num_draft_tokens, self._probs_size)
        return (
            self._all_pending[: math.prod(pending)].view(pending),
            self._all_draft_probs[: math.prod(probs)].view(probs),
        )

    def set_num_draft_tokens(self, count: int) -> None:
        """Sets the draft tokens of the following steps: 0 (standard steps) to the decoder's maximum.

        For verify mode: its greedy text stays the same whatever is changed when. Surplus draft tokens are dropped.
        Missing ones are padded with the first token of the draft vocabulary, which is verified like any other and rarely
        accepted. The module does not see the tokens of steps without drafts, and goes on after them as if they were not there.

        Raises RecycleError in other modes and for numbers out of range.
        """
        if self.mode != "verify":
            raise RecycleError(f"mode is {self.mode!r}; drafts can be changed in verify alone")
        count = arguments.integer("count", count, 0, self._max_draft_tokens)
        if count == self.num_draft_tokens:
            return
        common = min(count, self.num_draft_tokens)
        pending, probs = self.pending[:, : common + 1].clone(), self.draft_probs[:, :common].clone()
        self.num_draft_tokens = count
        self.pending, self.draft_probs = self._views(count)
        self.pending[:, : common + 1] = pending
        self.pending[:, common + 1 :] = self._padding
        self.draft_probs[:, :common] = probs
        # A one-hot distribution for the padding, so that speculative sampling stays exact.
        self.draft_probs[:, common:] = 0
        self.draft_probs[:, common:, :1] = 1

    @functools.cached_property
    def _padding(self) -> int:
        """The first token that the module can name."""
        if not self.model.module_config.draft_vocab_size:
            return 0
        return int(read_plan(self.model.weights, self.model.plan).module.draft_vocab[0])

    def arguments(self) -> tuple:
        """What both ops take, in the order of their schemas."""
        return (
            self.model.weights,
            self.model.plan,
            self.base_cache,
            self.module_cache,
            self.pending,
            self.lengths,
            self.draft_probs,
            self.scratch,
            MODES[self.mode if self.num_draft_tokens else "standard"],
            *self._sampling,
        )

    def prefill(self, prompt: Sequence[int], sequence: int = 0) -> int:
        """Reads a prompt (token ids) into ``sequence``, from its start; returns the first new token.

        Ctrl-C ends it after at most 64 rows. Raises RecycleError for ids outside the vocabulary and for a prompt that does
        not fit, RuntimeError for a logit that is not finite. The sequence is then idle.
        """
        prompt = arguments.token_ids("prompt", prompt, self.model.config.vocab_size)
        sequence = self._sequence(sequence)
        if len(prompt) >= self.capacity:
            raise RecycleError(
                f"the prompt has {len(prompt)} tokens; there is room for {self.capacity}, new tokens included"
            )
        self._forget_steps(sequence)
        ids = torch.tensor(prompt, dtype=torch.int64, device="cpu")
        without_drafts = self.mode == "verify" and not self.num_draft_tokens
        if without_drafts:  # the module reads the prompt all the same
            self.set_num_draft_tokens(1)
        try:
            torch.ops.recycle.prefill(*self.arguments(), sequence, ids)
        finally:
            if without_drafts:
                self.set_num_draft_tokens(0)
        return int(self.pending[sequence, 0])

    def step(self) -> Step:
        """One decode step of all sequences that have a prompt. Step says which of them failed, and why."""
        self.steps += 1
        if self._on_gpu:
            graph = self._active_graph() or self._start()
            tokens, counts = graph.read()
            seconds = graph.seconds
        else:
            self._follow_policy()
            begin = time.perf_counter()
            tokens, counts = torch.ops.recycle.decode_step(*self.arguments())
            seconds = time.perf_counter() - begin
        step = Step(tokens, counts, tokens.shape[1] - 1, seconds)
        if self.policy is not None:
            accepted = [count - 1 for count in counts.tolist() if count > 0]
            if accepted:
                self.policy.observe(step.drafted, accepted, seconds)
        return step

    def run(self) -> Iterator[Step]:
        """What ``step`` returns, step after step, without an end.

        On a GPU the next step is started before the results of the last one are read, so the state is one step
        further than what was returned. All started steps are read before the number of draft tokens changes.
        """
        while True:
            if self._on_gpu:
                while self._may_start():
                    self._start()
            yield self.step()

    def _follow_policy(self) -> None:
        if self.policy is not None:
            self.set_num_draft_tokens(self.policy.choose())

    def _may_start(self) -> bool:
        """Whether another step can be started before the started ones are read."""
        graph = self._active_graph()
        if graph is None:
            return True
        wanted = self.num_draft_tokens if self.policy is None else self.policy.choose()
        return graph.n_started < 2 and graph is self._graphs.get(wanted)

    def _start(self) -> GraphedStep:
        self._follow_policy()
        graph = self.capture()
        graph.start()
        return graph

    def _active_graph(self) -> GraphedStep | None:
        """The one graph with steps that were started and not read."""
        return next((graph for graph in self._graphs.values() if graph.n_started), None)

    def capture(self) -> GraphedStep:
        """The graph of a step with ``num_draft_tokens``, on a GPU; the first call captures it (a fraction of a second)."""
        if self.num_draft_tokens not in self._graphs:
            self._graphs[self.num_draft_tokens] = GraphedStep(self.arguments())
        return self._graphs[self.num_draft_tokens]

    def room(self, sequence: int = 0) -> int:
        """Tokens a sequence may still grow by."""
        sequence = self._sequence(sequence)
        return self.capacity - int(self.lengths[0, sequence]) - 1

    def release(self, sequence: int) -> None:
        """Ends a sequence: steps skip it until its next prefill."""
        sequence = self._sequence(sequence)
        self._forget_steps(sequence)
        self.pending[sequence] = -1

    def _sequence(self, sequence: int) -> int:
        """The number of a sequence, checked."""
        return arguments.integer("sequence", sequence, 0, self.batch - 1)

    def _forget_steps(self, sequence: int) -> None:
        """Drops the results of started steps: they belong to the sequence's previous text."""
        for graph in self._graphs.values():
            graph.forget(sequence)

    def decode(
        self, prompt: Sequence[int], max_new_tokens: int | None = None, end_tokens: Collection[int] = ()
    ) -> Iterator[SequenceStep]:
        """Prefill and decode steps of one sequence (batch 1), until an end token or ``max_new_tokens``.

        prompt: token ids. max_new_tokens: at most; None, or more than fit: until the capacity is reached. The first
        record is the prefill's, with one token and no draft tokens. Each record is cut at the end (SequenceStep.cut).

        Raises RecycleError for a logit that is not finite.
        """
        if max_new_tokens is not None:
            max_new_tokens = arguments.integer("max_new_tokens", max_new_tokens, 1)
        if not isinstance(end_tokens, (set, frozenset)):
            end_tokens = arguments.integers("end_tokens", end_tokens, "token ids")
        begin = time.perf_counter()
        first = self.prefill(prompt)
        if self._on_gpu:
            self.capture()
        left = self.room() + 1
        if max_new_tokens is not None:
            left = min(left, max_new_tokens)
        record = SequenceStep([first], 0, 0, time.perf_counter() - begin)
        steps = self.run()
        while True:
            yield record
            left -= len(record.tokens)
            if left <= 0 or record.tokens[-1] in end_tokens:
                return
            begin = time.perf_counter()
            step = next(steps)
            if failure := step.failure():
                raise RecycleError(f"{failure} (position {int(self.lengths[0, 0])}, or a draft token after it)")
            seconds = time.perf_counter() - begin
            record = dataclasses.replace(step.sequence(), seconds=seconds).cut(left, end_tokens)

    def stream(self, prompt: Sequence[int]) -> Iterator[int]:
        """Token ids after the prompt, one by one, until the capacity is reached (batch 1)."""
        for record in self.decode(prompt):
            yield from record.tokens
