"""Which tokens a module may draft: the most frequent of its text, as many as give the most tokens a second.

    python -m recycle_ext.train.draft_vocab DIR --base MODEL --sizes 2048,4096,8192,16384

A small vocabulary saves reading the rows of the head that are seldom right, and loses the drafts they would
have given. Both are measured, in greedy verify mode on the text that the run in DIR held out, and the module in DIR is
saved with the fastest size. Its other weights stay: the head's rows are the base's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
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
from recycle_ext.eval.decoding import Run, decode
from recycle_ext.measuring.interleave import rounds
from recycle_ext.train.states import held_out, read_shard
from recycle_ext.weights.pack import pack_model

PROMPT_TOKENS, NEW_TOKENS = 48, 96


def frequent_tokens(tokens: Tensor, size: int, vocab_size: int) -> tuple[Tensor, float]:
    """The ``size`` most frequent token ids, ascending, and the share of the text they make up."""
    counts = torch.bincount(tokens.flatten().long(), minlength=vocab_size)
    kept = counts.topk(size).indices.sort().values
    return kept, float(counts[kept].sum() / counts.sum())


@dataclass
class Choice:
    """A size and what it comes to: coverage, the share of the text; sums over all prompts."""

    ids: Tensor
    coverage: float
    module_bytes: int
    decoder: Decoder
    offered: int = 0
    accepted: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, run: Run) -> None:
        """Another prompt's."""
        self.offered += run.offered[0]
        self.accepted += run.accepted[0]
        self.tokens += run.step_tokens
        self.seconds += run.seconds


def cut(module: ModuleCheckpoint, base: Checkpoint, ids: Tensor, folder: Path) -> ModuleCheckpoint:
    """The module with another draft vocabulary, [n] int64 ascending, saved in ``folder``."""
    save_module(
        folder,
        replace(module.config, draft_vocab_size=len(ids)),
        module.state_dict() | {"draft_vocab": ids},
    )
    return open_module(folder, base)


def measure(
    module: ModuleCheckpoint,
    base: Checkpoint,
    tokens: Tensor,
    prompts: Sequence[list[int]],
    sizes: Sequence[int],
    dtype: str | None,
    module_dtype: str | None = None,
) -> list[Choice]:
    """Greedy verify mode, one draft a step, with each size; the sizes take turns at each prompt.

    tokens: the text that frequencies are counted in. prompts: token ids, as many each.
    """
    choices = []
    capacity = min(len(prompts[0]) + NEW_TOKENS, base.config.max_position_embeddings)
    new_tokens = capacity - len(prompts[0])
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            ids, coverage = frequent_tokens(tokens, size, base.config.vocab_size)
            packed = pack_model(
                base, cut(module, base, ids, Path(folder) / str(size)), dtype, module_dtype
            )
            decoder = Decoder(packed, "verify", 1, capacity=capacity)
            choices.append(Choice(ids, coverage, packed.module_bytes, decoder))
    for choice in choices:
        decode(
            choice.decoder, prompts[0], min(8, new_tokens), ()
        )  # memory is touched, threads are there
    for prompt, order in zip(tqdm(prompts), rounds(choices, len(prompts)), strict=True):
        for choice in order:
            choice.add(decode(choice.decoder, prompt, new_tokens, base.config.eos_token_ids))
    return choices


def table(choices: Sequence[Choice]) -> str:
    """Markdown."""
    lines = [
        "| draft vocabulary | of the text | module and head, MB | acceptance | tokens/s |",
        "|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {len(c.ids):,} | {c.coverage:.1%} | {c.module_bytes / 1e6:.1f} "
        f"| {c.accepted / c.offered:.3f} | {c.tokens / c.seconds:.1f} |"
        for c in choices
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m recycle_ext.train.draft_vocab",
        description="Chooses the size of a module's draft vocabulary by tokens a second.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("folder", metavar="DIR", help="--output of a run of recycle_ext.train")
    add("--base", help="as given to recycle_ext.train")
    add("--sizes", default="2048,4096,8192,16384", help="to choose from")
    add("--prompts", type=int, default=32, help="sequences held out, to measure with")
    add("--held-out", type=float, default=0.02, help="as given to recycle_ext.train")
    add("--dtype", choices=DTYPES, help="weights in memory (none: a GGUF's own, else bf16)")
    add("--module-dtype", choices=DTYPES, help="of the module (none: what it was trained for)")
    add("--threads", type=int, help="none: the cores this process may use")
    options = parser.parse_args(arguments)
    return exit_status(lambda: choose(options))


def choose(options: argparse.Namespace) -> int:
    """Measures, tells, and saves the fastest."""
    base = open_checkpoint(options.base)
    folder = Path(options.folder)
    module = open_module(folder, base)
    sizes = numbers("--sizes", options.sizes)
    if max(sizes) > base.config.vocab_size:
        raise RecycleError(
            f"--sizes has {max(sizes)}; the base's vocabulary has {base.config.vocab_size}"
        )
    shards = sorted([*folder.glob("self-*.safetensors"), *folder.glob("read-*.safetensors")])
    if not shards:
        raise RecycleError(
            f"{folder}: none of the run's text is there (self-* or read-*.safetensors)"
        )
    if options.threads is not None:
        _C.set_n_threads(options.threads)
    tokens = torch.cat([read_shard(file, base.fingerprint)[0] for file in shards])
    n_held = held_out(len(tokens), options.held_out)
    prompts = tokens[-n_held:][: options.prompts, :PROMPT_TOKENS].tolist()
    choices = measure(
        module, base, tokens[:-n_held], prompts, sizes, options.dtype, options.module_dtype
    )
    print(table(choices))
    best = max(choices, key=lambda choice: choice.tokens / choice.seconds)
    cut(module, base, best.ids, folder)
    print(f"{folder}: saved with {len(best.ids):,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
