"""The module on its own outputs, for all positions of a sequence at once: what `--drafts 2` and more run.

Draft s of a step starting at row i stands at row p = i + s - 1 and is made from the embedding of x_{p+1}
and, for s > 1, the module's own output at row p - 1 in the place of h. Decoding has by then true rows up
to i in the module's cache, and one of each earlier draft after them. So at draft s the query of row p
sees

    draft 1's keys (the true rows)   at rows j <= p - s + 1
    draft t's keys, t = 2 .. s       at row  j  = p - s + t

which is one attention over the keys of all drafts so far, with a mask. (HASS, Zhang et al. 2024, section
3.2, and EAGLE-3, Li et al. 2025, section 3.1, train in the same way.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


class ChainCache:
    """Keys and values of every draft so far; stands in for reference.KvCache in the module."""

    length = 0  # of the text before: each draft's rows start at position 0

    def __init__(self) -> None:
        self.drafts = 0
        self._layers: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds a draft's [B, n_kv_heads, T, head_dim] to a layer and returns those of all, one after the other."""
        if layer == 0:
            self.drafts += 1
        held = self._layers.setdefault(layer, [])
        held.append((keys, values))
        return torch.cat([k for k, _ in held], 2), torch.cat([v for _, v in held], 2)

    def mask(self, rows: int, device: torch.device) -> Tensor | None:
        """[rows, drafts * rows] bool, as the head of this file says."""
        s = self.drafts
        if s == 1:
            return None
        row = torch.arange(rows, device=device)
        behind = row[:, None] - row[None, :]  # p - j
        parts = [behind >= s - 1] + [behind == s - t for t in range(2, s + 1)]
        return torch.cat(parts, 1)


@dataclass(frozen=True)
class Draft:
    """One draft of every position: states [B, T, d] that go into the head. Rows before ``first`` are none."""

    states: Tensor
    first: int


def chain(
    module: Callable[..., tuple[Tensor, Tensor]], embedding: Tensor, hidden: Tensor, drafts: int
) -> Iterator[Draft]:
    """Drafts 1 .. ``drafts``. module: as RecyclableModule.forward. embedding [B, T, d] of x_{i+1} and hidden [B, T, d], h_i, at row i.

    The guess at row p, of whichever draft, is of x_{p+2}.
    """
    cache = ChainCache()
    for first in range(drafts):
        states, normed = module(embedding, hidden, cache if drafts > 1 else None)
        yield Draft(normed, first)
        hidden = torch.cat((states[:, :1], states[:, :-1]), 1)


def acceptance_by_draft(
    picks: list[Tensor], wanted: Tensor, tokens: Tensor
) -> tuple[list[int], list[int]]:
    """How many of each draft's guesses greedy verify mode would accept, and how many it would see.

    picks: for each draft [B, T], the module's first choice of x_{p+2} at row p; wanted [B, T], the base's;
    tokens [B, T], the text's. A draft is seen only if those before it were accepted, and, because the
    chain goes on with the text's tokens, only where the text says what the draft did.
    """
    accepted, seen = [], []
    alive = torch.ones_like(wanted, dtype=torch.bool)
    for pick in picks:
        right = alive & (pick == wanted)
        accepted.append(int(right.sum()))
        seen.append(int(alive.sum()))
        follows = right & (pick == tokens)
        alive = torch.cat((torch.zeros_like(follows[:, :1]), follows[:, :-1]), 1)
    return accepted, seen
