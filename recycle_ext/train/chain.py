"""The module on its own outputs, for all positions of a sequence at once: training for several draft tokens a step.

Draft s of a step that starts at row i stands at row p = i + s - 1. Its inputs are the embedding of x_{p+1} and, for
s > 1, the module's own output at row p - 1 in the place of h. When decoding makes this draft, the module's cache holds
true rows up to i, then one row of each earlier draft. So at draft s the query of row p sees

    draft 1's keys (the true rows)   at rows j <= p - s + 1
    draft t's keys, t = 2 .. s       at row  j  = p - s + t

That is one attention over the keys of all drafts so far, with a mask. HASS (Zhang et al. 2024, section 3.2) and EAGLE-3
(Li et al. 2025, section 3.1) train in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


class ChainCache:
    """Keys and values of every draft so far, in the place of reference.KvCache."""

    length = 0  # Each draft's rows start at position 0.

    def __init__(self) -> None:
        self.n_drafts = 0
        self._layers: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds one draft's keys and values, [B, n_kv_heads, T, head_dim] each, to a layer.

        Returns those of all drafts in order, [B, n_kv_heads, n_drafts * T, head_dim] each.
        """
        if layer == 0:
            self.n_drafts += 1
        stored = self._layers.setdefault(layer, [])
        stored.append((keys, values))
        return torch.cat([k for k, _ in stored], 2), torch.cat([v for _, v in stored], 2)

    def mask(self, rows: int, device: torch.device) -> Tensor | None:
        """[rows, n_drafts * rows] bool, the rule of this file's docstring; None: plain causal attention."""
        s = self.n_drafts
        if s == 1:
            return None
        row = torch.arange(rows, device=device)
        distance = row[:, None] - row[None, :]  # p - j
        parts = [distance >= s - 1] + [distance == s - t for t in range(2, s + 1)]
        return torch.cat(parts, 1)


@dataclass(frozen=True)
class Draft:
    """One draft token at every position: states [B, T, d] that go into the head, valid from row ``first`` on."""

    states: Tensor
    first: int


def chain(
    module: Callable[..., tuple[Tensor, Tensor]], embedding: Tensor, hidden: Tensor, num_draft_tokens: int
) -> Iterator[Draft]:
    """Drafts 1 .. ``num_draft_tokens``; row p of each predicts x_{p+2}.

    module: as RecyclableModule.forward. embedding [B, T, d]: of x_{i+1} at row i. hidden [B, T, d]: h_i at row i.
    """
    cache = ChainCache() if num_draft_tokens > 1 else None
    for first in range(num_draft_tokens):
        states, normed = module(embedding, hidden, cache)
        yield Draft(normed, first)
        hidden = torch.cat((states[:, :1], states[:, :-1]), 1)


def count_accepted(draft_tokens: list[Tensor], base_tokens: Tensor, text_tokens: Tensor) -> tuple[list[int], list[int]]:
    """How many tokens of each draft greedy verify mode accepts, and how many it verifies.

    draft_tokens: for each draft [B, T], the module's argmax for x_{p+2} at row p. base_tokens [B, T]: the base's.
    text_tokens [B, T]: the text's. A draft token is verified only where all before it in the chain were accepted. The
    chain of training goes on with the text, so a chain also ends where the text differs from the draft token.
    """
    accepted, verified = [], []
    is_verified = torch.ones_like(base_tokens, dtype=torch.bool)
    for tokens in draft_tokens:
        is_accepted = is_verified & (tokens == base_tokens)
        accepted.append(int(is_accepted.sum()))
        verified.append(int(is_verified.sum()))
        goes_on = is_accepted & (tokens == text_tokens)
        is_verified = torch.cat((torch.zeros_like(goes_on[:, :1]), goes_on[:, :-1]), 1)
    return accepted, verified
