"""Soak: the tokens of greedy verify mode are those of standard mode, over random models and batches.

    python python_tests/soak.py --tokens 1000000 --seed 0

One round is one random model (architecture, layers, weight formats, draft vocabulary, cache type) and one batch of up to
four slots. Sequences join and leave the slots; the number of draft tokens is fixed, changes with every step, or is
"auto"; the instruction set and the number of threads are drawn anew. Each finished sequence must have the tokens that
standard mode gives for its prompt alone. A round depends on its seed only, so a failure is run again by
`--seed SEED --tokens 1`. At the end, the memory of the process must be what it was after the first tenth.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from formats import in_formats
from models import ARCHITECTURES, write_base, write_module

from recycle_ext import _C
from recycle_ext.checkpoint.config import DTYPES
from recycle_ext.decoding.decoder import Decoder
from recycle_ext.decoding.kv_cache import CACHE_DTYPES
from recycle_ext.weights.layout import FORMATS
from recycle_ext.weights.pack import PackedModel, pack_model

VOCAB = 101
CAPACITY = 160
STEPS = 400  # of a round
# What the process may hold at the end beyond what it held after the first tenth, bytes: the allocator's own noise.
GROWTH = 32 << 20


@dataclass
class Sequence:
    """A text in a slot: it leaves when it has `target` tokens."""

    prompt: list[int]
    target: int
    tokens: list[int] = field(default_factory=list)


@dataclass
class Round:
    """What one round compared."""

    tokens: int = 0
    sequences: int = 0
    accepted: int = 0


def random_model(rng: random.Random, folder: Path) -> PackedModel:
    heads = rng.choice([(4, 2), (4, 4), (6, 2), (3, 1)])
    # Rounds in the formats of GGUF files, two of them mixed, need rows of 256.
    formats = rng.sample(list(FORMATS), 2) if rng.random() < 0.5 else None
    base = write_base(
        folder / "base",
        rng.choice(list(ARCHITECTURES)),
        rng.randrange(10**6),
        VOCAB,
        hidden_size=256 if formats else rng.choice([64, 96]),
        intermediate_size=256 if formats else rng.choice([96, 160]),
        n_layers=rng.randint(1, 3),
        n_heads=heads[0],
        n_kv_heads=heads[1],
        tied=formats is None and rng.random() < 0.5,
    )
    module = write_module(
        folder / "module",
        base,
        rng.randrange(10**6),
        input_bias=rng.random() < 0.3,
        zero_first_embedding=rng.random() < 0.3,
        draft_vocab_size=rng.choice([0, 0, 50]),
        like_base=rng.random() < 0.7,
    )
    if formats:
        return in_formats(pack_model(base, module, "f32"), formats, torch.Generator().manual_seed(rng.randrange(10**6)))
    return pack_model(base, module, rng.choice(list(DTYPES)), rng.choice([None, *DTYPES]))


def random_sequence(rng: random.Random) -> Sequence:
    prompt = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 2, 7, 30, 70]))]
    return Sequence(prompt, rng.randint(1, CAPACITY - len(prompt)))


def standard_tokens(packed: PackedModel, sequence: Sequence, cache_dtype) -> list[int]:
    decoder = Decoder(packed, "standard", capacity=CAPACITY, cache_dtype=cache_dtype)
    return [token for record in decoder.decode(sequence.prompt, sequence.target) for token in record.tokens]


def run_round(seed: int) -> Round:
    """Raises AssertionError where a sequence differs from standard mode."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        packed = random_model(rng, Path(folder))
    cache_dtype = rng.choice(list(CACHE_DTYPES.values()))
    drafts = rng.choice([1, 2, 3, 4, "auto"])
    changing = drafts == 4 and rng.random() < 0.5
    batch = rng.randint(1, 4)
    _C.force_isa(rng.choice(_C.runnable_isas()))
    _C.set_n_threads(rng.randint(1, 3))
    decoder = Decoder(packed, "verify", drafts, batch, CAPACITY, cache_dtype=cache_dtype)
    slots: list[Sequence | None] = [None] * batch
    finished: list[Sequence] = []
    result = Round()
    for _ in range(STEPS):
        for slot, sequence in enumerate(slots):
            if sequence is None and rng.random() < 0.2:
                slots[slot] = joined = random_sequence(rng)
                joined.tokens.append(decoder.prefill(joined.prompt, slot))
        if changing:
            decoder.set_num_draft_tokens(rng.randint(0, 4))
        step = decoder.step()
        for slot, sequence in enumerate(slots):
            if sequence is None:
                continue
            count = int(step.counts[slot])
            sequence.tokens += step.tokens[slot, :count].tolist()
            result.accepted += count - 1
            if len(sequence.tokens) >= sequence.target:
                decoder.release(slot)
                finished.append(sequence)
                slots[slot] = None
    _C.set_n_threads(rng.randint(1, 3))
    for sequence in finished:
        expected = standard_tokens(packed, sequence, cache_dtype)
        given = sequence.tokens[: sequence.target]
        assert given == expected, f"seed {seed}: prompt {sequence.prompt}: verify gives {given}, standard {expected}"
        result.tokens += len(given)
        result.sequences += 1
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=1_000_000, help="tokens to compare, at least")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first round; the next round has the next seed")
    options = parser.parse_args()
    total, seed, begin = Round(), options.seed, time.perf_counter()
    process, settled = psutil.Process(), None
    while total.tokens < options.tokens:
        one = run_round(seed)
        total = Round(total.tokens + one.tokens, total.sequences + one.sequences, total.accepted + one.accepted)
        seed += 1
        gc.collect()
        if settled is None and 10 * total.tokens >= options.tokens:
            settled = process.memory_info().rss
    grown = process.memory_info().rss - settled
    print(
        f"{total.tokens} tokens of {total.sequences} sequences in {seed - options.seed} rounds equal standard mode; "
        f"{total.accepted} draft tokens were accepted; {time.perf_counter() - begin:.0f} s; "
        f"memory {settled >> 20} MiB after a tenth, {(settled + grown) >> 20} MiB at the end"
    )
    if grown > GROWTH:
        print(f"the process has grown by {grown >> 20} MiB; {GROWTH >> 20} MiB are expected at most")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
