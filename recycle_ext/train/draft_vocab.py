"""Chooses a module's draft vocabulary: the most frequent tokens of its text, as many as give the most tokens a second.

    python -m recycle_ext.train.draft_vocab DIR --base MODEL --sizes 2048,4096,8192,16384

A small vocabulary saves reading rows of the head that are seldom drafted, and loses the tokens of those rows. Each size
is measured in greedy verify mode on the text that the run in DIR held out, and the module in DIR is saved with the
fastest. Its other weights stay, because the head's rows are the base's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from recycle_ext import _C
from recycle_ext.checkpoint.base_model import Checkpoint, open_checkpoint
from recycle_ext.checkpoint.config import DTYPES
from recycle_ext.checkpoint.module import ModuleCheckpoint, open_module, save_module
from recycle_ext.command_line import exit_status, numbers
from recycle_ext.decoding.decoder import Decoder
from recycle_ext.errors import RecycleError
from recycle_ext.measuring.interleave import rounds
from recycle_ext.train.states import count_held_out, read_shard
from recycle_ext.weights.pack import pack_model

PROMPT_TOKENS, NEW_TOKENS = 48, 96
WARMUP_TOKENS = 8


def frequent_tokens(tokens: Tensor, size: int, vocab_size: int) -> tuple[Tensor, float]:
    """The ``size`` most frequent ids of ``tokens`` (integers of any shape), and their share of the text.

    -> [size] int64 ascending, and a number in [0, 1].
    """
    counts = torch.bincount(tokens.flatten().long(), minlength=vocab_size)
    ids = counts.topk(size).indices.sort().values
    return ids, float(counts[ids].sum() / counts.sum())


@dataclass
class Candidate:
    """A draft vocabulary and the sums of its decode steps over all prompts.

    ids: [n] int64 ascending. coverage: their share of the text. module_bytes: the module and its part of the head.
    """

    ids: Tensor
    coverage: float
    module_bytes: int
    decoder: Decoder
    drafted: int = 0
    accepted: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of the decode steps; the prefills are not counted."""
        return self.tokens / self.seconds

    def decode(self, prompt: list[int], new_tokens: int, end_tokens: Collection[int]) -> None:
        """Decodes after a prompt and adds the steps to the sums. Raises RecycleError for nonfinite logits."""
        steps = self.decoder.decode(prompt, new_tokens, end_tokens)
        try:
            next(steps)  # the prefill
            for step in steps:
                self.drafted += step.drafted
                self.accepted += step.accepted
                self.tokens += len(step.tokens)
                self.seconds += step.seconds
        except RuntimeError as error:
            raise RecycleError(f"draft vocabulary of {len(self.ids)} tokens: {error}") from None


def with_draft_vocab(module: ModuleCheckpoint, base: Checkpoint, ids: Tensor, folder: Path) -> ModuleCheckpoint:
    """The module with another draft vocabulary, ids [n] int64 ascending, saved in ``folder``."""
    config = replace(module.config, draft_vocab_size=len(ids))
    save_module(folder, config, module.state_dict() | {"draft_vocab": ids})
    return open_module(folder, base)


def measure(
    module: ModuleCheckpoint,
    base: Checkpoint,
    tokens: Tensor,
    prompts: Sequence[list[int]],
    sizes: Sequence[int],
    dtype: str | None,
    module_dtype: str | None = None,
) -> list[Candidate]:
    """Greedy verify mode with one draft token a step, for each size; the sizes are interleaved prompt by prompt.

    tokens: the text that frequencies are counted in. prompts: token ids, all of one length.
    """
    capacity = min(len(prompts[0]) + NEW_TOKENS, base.config.max_position_embeddings)
    new_tokens = capacity - len(prompts[0])
    end_tokens = base.tokenizer.eos_token_ids

    def candidate(size: int, folder: Path) -> Candidate:
        ids, coverage = frequent_tokens(tokens, size, base.config.vocab_size)
        smaller = with_draft_vocab(module, base, ids, folder)
        packed = pack_model(base, smaller, dtype, module_dtype)
        decoder = Decoder(packed, "verify", 1, capacity=capacity)
        return Candidate(ids, coverage, packed.module_bytes, decoder)

    with tempfile.TemporaryDirectory() as folder:
        candidates = [candidate(size, Path(folder) / str(size)) for size in sizes]
    for each in candidates:
        # Maps the memory and starts the threads; a copy counts these steps.
        replace(each).decode(prompts[0], min(WARMUP_TOKENS, new_tokens), ())
    for prompt, order in zip(tqdm(prompts), rounds(candidates, len(prompts)), strict=True):
        for each in order:
            each.decode(prompt, new_tokens, end_tokens)
    return candidates


def table(candidates: Sequence[Candidate]) -> str:
    """The results as Markdown."""
    lines = [
        "| draft vocabulary | of the text | module and head, MB | acceptance | tokens/s |",
        "|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {len(c.ids):,} | {c.coverage:.1%} | {c.module_bytes / 1e6:.1f} "
        f"| {c.accepted / c.drafted:.3f} | {c.tokens_per_second:.1f} |"
        for c in candidates
    ]
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, described by --help."""
    parser = argparse.ArgumentParser(
        prog="python -m recycle_ext.train.draft_vocab",
        description="Chooses the size of a module's draft vocabulary by tokens a second.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("folder", metavar="DIR", help="--output of a run of recycle_ext.train")
    add("--base", help="as given to recycle_ext.train")
    add("--sizes", default="2048,4096,8192,16384", help="sizes to choose from")
    add("--prompts", type=int, default=32, help="held-out sequences to measure with")
    add("--held-out", type=float, default=0.02, help="as given to recycle_ext.train")
    add("--dtype", choices=DTYPES, help="weights in memory (none: a GGUF's own, else bf16)")
    add("--module-dtype", choices=DTYPES, help="the module's weights (none: as it was trained)")
    add("--threads", type=int, help="none: the cores this process may use")
    return parser.parse_args(arguments)


def choose(options: argparse.Namespace) -> int:
    """Measures the sizes, prints the table and saves the module with the fastest."""
    base = open_checkpoint(options.base)
    folder = Path(options.folder)
    module = open_module(folder, base)
    sizes = numbers("--sizes", options.sizes)
    if max(sizes) > base.config.vocab_size:
        raise RecycleError(f"--sizes has {max(sizes)}; the base's vocabulary has {base.config.vocab_size}")
    shards = sorted([*folder.glob("self-*.safetensors"), *folder.glob("read-*.safetensors")])
    if not shards:
        raise RecycleError(
            f"{folder}: none of the run's text is there (self-* or read-*.safetensors); "
            "give the --output of a run without --online or --joint"
        )
    if options.threads is not None:
        _C.set_n_threads(options.threads)
    tokens = torch.cat([read_shard(file, base.fingerprint)[0] for file in shards])
    n_held_out = count_held_out(len(tokens), options.held_out)
    prompts = tokens[-n_held_out:][: options.prompts, :PROMPT_TOKENS].tolist()
    candidates = measure(module, base, tokens[:-n_held_out], prompts, sizes, options.dtype, options.module_dtype)
    print(table(candidates))
    best = max(candidates, key=lambda candidate: candidate.tokens_per_second)
    with_draft_vocab(module, base, best.ids, folder)
    print(f"{folder}: saved with {len(best.ids):,} tokens")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    return exit_status(lambda: choose(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
