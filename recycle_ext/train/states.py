"""Text with the base's hidden states, on disk: what a module on a frozen base is trained on.

The base reads, or writes, each text once and its states are kept, because a pass over the base costs many
times a step of the module. A shard is a safetensors file with tokens [n, T] int32 and hidden [n, T, d]
bfloat16, h_i after token i; it is mapped into memory, not read, so that a run may have more of them than memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from recycle_ext.errors import RecycleError
from recycle_ext.reference.model import BaseModel
from recycle_ext.text.tokenizer import Tokenizer
from recycle_ext.train.self_text import Prompts, write_text
from recycle_ext.train.workers import Workers

WRITTEN_AT_ONCE = 256  # sequences that the base writes together: a shard
READ_AT_ONCE = 16
READ_A_SHARD = 512


class States:
    """Shards, as one list of sequences.

    tokens: of each shard [n, T] int32; hidden: of each shard [n, T, d] bfloat16, or None where the base
    is to run in every step (``online``).
    """

    def __init__(self, shards: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        self.shards = shards
        self.where = [(s, row) for s, shard in enumerate(shards) for row in range(len(shard[0]))]

    def __len__(self) -> int:
        return len(self.where)

    def tokens(self, index: Sequence[int] | None = None) -> Tensor:
        """[n, T] int64 of some sequences; None: of all."""
        chosen = self.where if index is None else [self.where[i] for i in index]
        return torch.stack([self.shards[s][0][row] for s, row in chosen]).long()

    def hidden(self, index: Sequence[int]) -> Tensor | None:
        """[n, T, d] bfloat16 of some sequences."""
        if self.shards[0][1] is None:
            return None
        return torch.stack([self.shards[s][1][row] for s, row in (self.where[i] for i in index)])


def write_shard(file: Path, tokens: Tensor, hidden: Tensor, fingerprint: str) -> None:
    """A reader sees the file whole, or not at all."""
    part = file.with_suffix(".part")
    tensors = {
        "tokens": tokens.int().contiguous(),
        "hidden": hidden.to(torch.bfloat16).contiguous(),
    }
    save_file(tensors, part, {"fingerprint": fingerprint})
    part.replace(file)


def read_shard(file: Path, fingerprint: str) -> tuple[Tensor, Tensor]:
    """Tokens and hidden states of a shard, which must be of this base."""
    try:
        with safe_open(file, "pt") as opened:
            if (opened.metadata() or {}).get("fingerprint") != fingerprint:
                raise RecycleError(
                    f"{file}: text of another base model; give --output a directory of its own"
                )
            return opened.get_tensor("tokens"), opened.get_tensor("hidden")
    except (OSError, SafetensorError) as error:
        raise RecycleError(f"{file}: damaged ({error}); delete it and run again") from None


def self_written(
    base: BaseModel,
    tokenizer: Tokenizer,
    folder: Path,
    fingerprint: str,
    n_tokens: int,
    length: int,
    seed: int,
    workers: Workers,
) -> list[tuple[Tensor, Tensor]]:
    """At least ``n_tokens`` of text by the base itself. What is in ``folder`` already is not written again."""
    ends = set(tokenizer.eos_token_ids)
    if len(end := tokenizer.encode("<|endoftext|>", add_bos=False)) == 1:
        ends |= set(end)
    n_shards = -(-n_tokens // (WRITTEN_AT_ONCE * length))
    files = [folder / f"self-{seed}-{length}-{index:03d}.safetensors" for index in range(n_shards)]
    total = n_shards * WRITTEN_AT_ONCE * length
    with tqdm(total=total, desc="writing text", unit=" tokens", disable=not workers.leads) as bar:
        for index, file in enumerate(files):
            if file.exists():
                read_shard(file, fingerprint)
                bar.update(WRITTEN_AT_ONCE * length)
            elif index % workers.count == workers.rank:
                shard_seed = 1000 + 1000 * seed + index
                prompts = Prompts(tokenizer, shard_seed)
                written = write_text(
                    base, prompts, ends, WRITTEN_AT_ONCE, length, shard_seed, bar.update
                )
                write_shard(file, *written, fingerprint)
    workers.wait()
    return [read_shard(file, fingerprint) for file in files]


@torch.no_grad()
def read_by(
    base: BaseModel, sequences: Tensor, folder: Path, fingerprint: str, workers: Workers
) -> list[tuple[Tensor, Tensor]]:
    """The base's states of given sequences [n, T]."""
    device = base.model.norm.weight.device
    parts = sequences.split(READ_A_SHARD)
    files = [folder / f"read-{index:03d}.safetensors" for index in range(len(parts))]
    with tqdm(total=len(sequences), desc="reading text", disable=not workers.leads) as bar:
        for index, (file, part) in enumerate(zip(files, parts, strict=True)):
            if file.exists() and torch.equal(read_shard(file, fingerprint)[0], part.int()):
                bar.update(len(part))
            elif index % workers.count == workers.rank:
                hidden = []
                for some in part.split(READ_AT_ONCE):
                    hidden.append(base(some.to(device)).to("cpu", torch.bfloat16))
                    bar.update(len(some))
                write_shard(file, part, torch.cat(hidden), fingerprint)
    workers.wait()
    return [read_shard(file, fingerprint) for file in files]


def held_out(n_sequences: int, share: float) -> int:
    """Sequences at the end that are not trained on."""
    return max(1, int(n_sequences * share))


def batches(n: int, size: int) -> Iterator[range]:
    """range(n) in pieces."""
    for start in range(0, n, size):
        yield range(start, min(start + size, n))
