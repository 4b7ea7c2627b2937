"""Text with the base's hidden states, on disk: the training data of a module for a frozen base.

The base reads, or writes, each text once and its states are stored, because a pass over the base costs many times a
step of the module. A shard is a safetensors file with tokens [n, T] int32 and hidden [n, T, d] bfloat16, h_i after
token i. Shards are mapped into memory, not read, so a run may have more of them than memory.
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
from recycle_ext.files import make_directory, whole_file
from recycle_ext.reference.model import BaseModel
from recycle_ext.text.tokenizer import Tokenizer
from recycle_ext.train.self_text import Prompts, write_text
from recycle_ext.train.workers import Workers

WRITE_BATCH = 256  # sequences that the base writes together: one shard
READ_BATCH = 16  # sequences that the base reads together
READ_SHARD = 512  # sequences of a shard that the base reads


class States:
    """Shards as one list of sequences.

    shards: for each, tokens [n, T] int32 and hidden states [n, T, d] bfloat16; None in place of the states where the
    base runs in every step (``--online``).
    """

    def __init__(self, shards: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        self.shards = shards
        self.rows = [(s, row) for s, shard in enumerate(shards) for row in range(len(shard[0]))]

    def __len__(self) -> int:
        return len(self.rows)

    def tokens(self, index: Sequence[int] | None = None) -> Tensor:
        """Tokens [n, T] int64 of the sequences ``index``; None: of all."""
        chosen = self.rows if index is None else [self.rows[i] for i in index]
        return torch.stack([self.shards[s][0][row] for s, row in chosen]).long()

    def hidden(self, index: Sequence[int]) -> Tensor | None:
        """Hidden states [n, T, d] bfloat16 of the sequences ``index``; None where the shards have none."""
        if self.shards[0][1] is None:
            return None
        return torch.stack([self.shards[s][1][row] for s, row in (self.rows[i] for i in index)])


def write_shard(file: Path, tokens: Tensor, hidden: Tensor, fingerprint: str) -> None:
    """Writes a shard of the base with this fingerprint. A reader sees the file whole, or not at all."""
    tensors = {"tokens": tokens.int().contiguous(), "hidden": hidden.to(torch.bfloat16).contiguous()}
    make_directory(file.parent)
    with whole_file(file) as part:
        save_file(tensors, part, {"fingerprint": fingerprint})


def read_shard(file: Path, fingerprint: str) -> tuple[Tensor, Tensor]:
    """Tokens and hidden states of a shard.

    Raises RecycleError for a damaged file, or where the fingerprint is of another base.
    """
    try:
        with safe_open(file, "pt") as opened:
            if (opened.metadata() or {}).get("fingerprint") != fingerprint:
                raise RecycleError(f"{file}: text of another base model; give --output a directory of its own")
            return opened.get_tensor("tokens"), opened.get_tensor("hidden")
    except (OSError, SafetensorError) as error:
        raise RecycleError(f"{file}: damaged ({error}); delete it and run again") from None


def shards_of_written_text(
    base: BaseModel,
    tokenizer: Tokenizer,
    folder: Path,
    fingerprint: str,
    n_tokens: int,
    length: int,
    seed: int,
    workers: Workers,
) -> list[tuple[Tensor, Tensor]]:
    """Shards in ``folder`` with at least ``n_tokens`` of text that the base writes.

    Existing shards are not written again. Each process writes its share.
    """
    ends = set(tokenizer.eos_token_ids)
    if len(end := tokenizer.encode("<|endoftext|>", add_bos=False)) == 1:
        ends |= set(end)
    n_shards = count_written(n_tokens, length) // WRITE_BATCH
    files = [folder / f"self-{seed}-{length}-{index:03d}.safetensors" for index in range(n_shards)]
    total = n_shards * WRITE_BATCH * length
    with tqdm(total=total, desc="writing text", unit=" tokens", disable=not workers.is_leader) as bar:
        for index, file in enumerate(files):
            if file.exists():
                read_shard(file, fingerprint)
                bar.update(WRITE_BATCH * length)
            elif index % workers.count == workers.rank:
                shard_seed = 1000 + 1000 * seed + index
                prompts = Prompts(tokenizer, shard_seed)
                written = write_text(base, prompts, ends, WRITE_BATCH, length, shard_seed, bar.update)
                write_shard(file, *written, fingerprint)
    workers.wait()
    return [read_shard(file, fingerprint) for file in files]


@torch.no_grad()
def shards_of_given_text(
    base: BaseModel, sequences: Tensor, folder: Path, fingerprint: str, workers: Workers
) -> list[tuple[Tensor, Tensor]]:
    """Shards in ``folder`` with the base's states of given sequences [n, T] int32.

    Existing shards are not computed again; RecycleError where one is of another text. Each process computes its share.
    """
    device = base.model.norm.weight.device
    parts = sequences.split(READ_SHARD)
    files = [folder / f"read-{index:03d}.safetensors" for index in range(len(parts))]
    for file, part in zip(files, parts, strict=True):
        if file.exists() and not torch.equal(read_shard(file, fingerprint)[0], part):
            raise RecycleError(f"{file}: states of another text; give another --output, or delete the file")
    workers.wait()  # All processes look before one of them writes.
    with tqdm(total=len(sequences), desc="reading text", disable=not workers.is_leader) as bar:
        for index, (file, part) in enumerate(zip(files, parts, strict=True)):
            if file.exists():
                bar.update(len(part))
            elif index % workers.count == workers.rank:
                hidden = []
                for batch in part.split(READ_BATCH):
                    hidden.append(base(batch.to(device)).to("cpu", torch.bfloat16))
                    bar.update(len(batch))
                write_shard(file, part, torch.cat(hidden), fingerprint)
    workers.wait()
    return [read_shard(file, fingerprint) for file in files]


def count_written(n_tokens: int, length: int) -> int:
    """How many sequences of ``length`` the base writes where at least ``n_tokens`` are wanted."""
    return -(-n_tokens // (WRITE_BATCH * length)) * WRITE_BATCH


def count_held_out(n_sequences: int, share: float) -> int:
    """How many sequences at the end are not trained on: ``share`` of them, at least one."""
    return max(1, int(n_sequences * share))


def batches(n: int, size: int) -> Iterator[range]:
    """range(n) in parts of at most ``size``."""
    for start in range(0, n, size):
        yield range(start, min(start + size, n))
