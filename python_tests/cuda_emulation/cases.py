"""Cases for replay.cpp: models of one layer with random weights, states of a decoder at chosen lengths."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from formats import columns, in_formats, random_matrix
from torch import Tensor

from recycle_ext.bench.random_model import SHAPES, random_model
from recycle_ext.checkpoint.config import ModuleConfig
from recycle_ext.decoding.decoder import MODES
from recycle_ext.weights.layout import FORMATS, QUANTIZATIONS
from recycle_ext.weights.plan import read_plan

CACHE_TYPES = {torch.float32: 0, torch.bfloat16: 1}
CHUNK = 64  # positions, csrc/cuda/attention.cu
SPLITS = 16
K_QUANTS = [name for name, quantization in QUANTIZATIONS.items() if quantization.block == 256]
# Neighbouring matrices differ in format. A matrix whose k a format can't have is in another one of the list, or in q8_0.
MIXED, MIXED_K = "mixed", "mixed k-quants"
MIXES = {MIXED: [name for name in FORMATS if name not in K_QUANTS], MIXED_K: K_QUANTS}
# The formats that have kernels of their own, and the mixes, which pass through the kernels for all formats.
KERNELS = ["bf16", "q8_0", "q4_0", "q4_1", "q4_k", "q6_k", MIXED, MIXED_K]
VOCAB, DRAFT_VOCAB, HIDDEN, INNER = 101, 37, 64, 96
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
# Around the ends of all chunks of the first round of splits, and of the first chunk of the second round.
LENGTHS = [1, *(chunk * CHUNK + near for chunk in range(1, SPLITS + 2) for near in (-1, 0, 1))]


@dataclass(frozen=True)
class Case:
    """What replay.cpp reads: integers, numbers (as 1024ths) and arrays."""

    name: str
    kind: int  # 0: a step; 1: attention_decode; 2: recycle_head
    fields: tuple[int | float | Tensor, ...]

    def encoded(self, seed: int) -> bytes:
        """seed: of the order of blocks and threads."""
        name = f"{self.name}, order {seed}\0".encode()
        parts = [struct.pack("<q", len(name)), name, struct.pack("<qq", seed, self.kind)]
        for field in self.fields:
            if isinstance(field, Tensor):
                data = field.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                parts += [struct.pack("<q", len(data)), data]
            else:
                parts.append(struct.pack("<q", round(field * 1024) if isinstance(field, float) else field))
        return b"".join(parts)


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@functools.cache
def model(format: str, with_module: bool = True) -> tuple[Tensor, Tensor]:
    """plan and weights of one layer, with biases and norms everywhere; a draft vocabulary that ascends in jumps."""
    formats = MIXES.get(format, [format])
    base = dataclasses.replace(
        SHAPES[1].base, vocab_size=VOCAB, hidden_size=columns(formats[0], HIDDEN), intermediate_size=INNER, n_layers=1,
        n_heads=HEADS, n_kv_heads=KV_HEADS, head_dim=HEAD_DIM, tie_word_embeddings=False, qkv_bias=True, qk_norm=True,
    )  # fmt: skip
    module = dataclasses.replace(ModuleConfig.like(base, 1, DRAFT_VOCAB), input_bias=True) if with_module else None
    packed = random_model(base, module, "f32", torch.device("cpu"))
    view = read_plan(packed.weights, packed.plan)
    if view.module is not None:
        view.module.draft_vocab.copy_(torch.arange(DRAFT_VOCAB) * 2 + 1)
    repacked = in_formats(packed, formats, torch.Generator().manual_seed(7))
    return repacked.plan, repacked.weights


def step(
    format: str,
    mode: str,
    drafts: int,
    lengths: list[int],
    *,
    cache: torch.dtype = torch.bfloat16,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    prefill: bool = False,
    steps: int = 1,
) -> Case:
    """A step of sequences of these lengths; length -1: an idle one. prefill: the end of the first one's prefill."""
    batch, rows = len(lengths), drafts + 1
    plan, weights = model(format, mode != "standard")
    capacity = max(lengths) + 2 * max(drafts, 1) * steps + 1
    pending = (torch.arange(batch * rows) * 7 % VOCAB).view(batch, rows)
    pending[torch.tensor(lengths) < 0] = -1
    if prefill:
        pending[0, 1:] = 0
    held = torch.tensor(lengths).clamp_min(0)
    name = f"{mode}, {format}, {drafts} drafts, lengths {lengths}, {str(cache).removeprefix('torch.')} cache"
    name += f", temperature {temperature}, top_k {top_k}, top_p {top_p}" * (temperature > 0) + ", prefill" * prefill
    caches = [_random(1, 2, batch, KV_HEADS, capacity, HEAD_DIM, dtype=cache) for _ in range(2)]
    has_probs = mode == "verify" and temperature > 0
    probs = torch.full((batch, drafts, DRAFT_VOCAB if has_probs else 0), 1 / DRAFT_VOCAB)
    fields = (len(plan), plan, len(weights), weights, batch, drafts, MODES[mode], 0 if prefill else -1, steps)
    fields += (CACHE_TYPES[cache], capacity, caches[0], capacity, caches[1], pending, torch.stack((held, held)))
    fields += (probs, temperature, top_k, top_p, torch.arange(batch) + 5)
    return Case(name, 0, fields)


def attention(rows: int, lengths: list[int], cache: torch.dtype, n_heads: int = HEADS) -> Case:
    """attention_decode of `rows` new rows."""
    batch, capacity = len(lengths), max(lengths) + rows
    q, k, v = (_random(batch, rows, heads, HEAD_DIM) for heads in (n_heads, KV_HEADS, KV_HEADS))
    fields = (batch, rows, n_heads, KV_HEADS, HEAD_DIM, q, k, v, torch.tensor(lengths), torch.ones(HEAD_DIM // 2))
    fields += (torch.ones(HEAD_DIM), CACHE_TYPES[cache], capacity)
    fields += (_random(1, 2, batch, KV_HEADS, capacity, HEAD_DIM, dtype=cache),)
    name = f"attention_decode, {rows} rows, {n_heads} heads, lengths {lengths}, {str(cache).removeprefix('torch.')}"
    return Case(name, 1, fields)


def head(format: str, rows: int, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Case:
    """recycle_head of `rows` rows."""
    hidden = columns(format, HIDDEN)
    weights, _ = random_matrix(format, VOCAB, hidden, torch.Generator().manual_seed(rows))
    fields = (rows, hidden, _random(rows, hidden), torch.ones(hidden), FORMATS[format], VOCAB)
    fields += (weights, temperature, top_k, top_p)
    fields += (torch.arange(rows), torch.arange(rows))
    return Case(f"recycle_head, {format}, {rows} rows, temperature {temperature}", 2, fields)


SAMPLED = {"temperature": 1.0, "top_k": 20, "top_p": 0.75}
# mode, draft tokens, sequences: 1 to 8 rows of each mode.
SHAPES_OF_STEPS = [("standard", 0, batch) for batch in range(1, 9)] + [
    (mode, drafts, batch)
    for mode in ("verify", "alternate")
    for drafts in (1, 2, 3, 4)
    for batch in range(1, 8 // (drafts + 1) + 1)
]


def all_cases() -> Iterator[Case]:
    """Modes, formats and rows; all lengths around the ends of chunks in each mode and in the op; the head; prefills."""
    lengths = itertools.cycle(LENGTHS)
    for (mode, drafts, batch), format in itertools.product(SHAPES_OF_STEPS, KERNELS):
        yield step(format, mode, drafts, list(itertools.islice(lengths, batch)))
    for (mode, drafts, batch), format in itertools.product(SHAPES_OF_STEPS, ["bf16", MIXED]):
        yield step(format, mode, drafts, list(itertools.islice(lengths, batch)), **SAMPLED)
    for (mode, drafts), length, cache in itertools.product(
        [("standard", 0), ("verify", 4), ("alternate", 2)], LENGTHS, CACHE_TYPES
    ):
        yield step("bf16", mode, drafts, [length], cache=cache)
    for rows, length, cache in itertools.product(range(1, 9), LENGTHS, CACHE_TYPES):
        yield attention(rows, [length], cache, 4 + 10 * (rows % 2))
    for format, rows in itertools.product(FORMATS, range(1, 9)):
        yield head(format, rows, 0.0)
    for rows in range(1, 9):
        yield head("bf16", rows, 1.0, 20, 0.75)
    for (mode, drafts, batch), sampling in itertools.product(SHAPES_OF_STEPS, ({}, SAMPLED)):
        if batch <= 2:
            yield step("bf16", mode, drafts, [70, 3][:batch], prefill=True, **sampling)
    yield step("bf16", "verify", 2, [5, -1, 64], steps=3)


def smoke_cases() -> list[Case]:
    """A few that launch every kernel."""
    return [
        step(MIXED, "verify", 2, [62, 130]),
        step("q6_k", "standard", 0, [64, -1]),
        attention(3, [127, 64], torch.float32, 14),
        attention(1, [SPLITS * CHUNK - 1], torch.bfloat16),  # every split has a chunk
    ]


def sampled_cases() -> list[Case]:
    """Those with kernels of 1,024 threads, which cost some seconds."""
    return [step("bf16", "verify", 1, [63], **SAMPLED), head("q4_k", 1, 1.0, 20, 0.75)]
