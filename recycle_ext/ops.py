"""Shapes of what the ops return, for torch.compile, export and opcheck.

The ops themselves are registered by ``_C``: torch.ops.recycle.attention_decode, recycle_head,
decode_step and prefill; csrc/bindings/ops.cpp has their schemas.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recycle_ext import _C  # noqa: F401  (registers the ops)


@torch.library.register_fake("recycle::attention_decode")
def _(q, k, v, cache, lengths, inv_freq, q_norm=None, k_norm=None, eps=1e-5) -> Tensor:
    return torch.empty_like(q)


@torch.library.register_fake("recycle::recycle_head")
def _(
    hidden, norm, eps, head, format, n_vocab, positions, temperature, top_k, top_p, seeds
) -> tuple[Tensor, Tensor]:
    rows = hidden.shape[0]
    return hidden.new_empty(rows, dtype=torch.int64), hidden.new_empty(rows)


@torch.library.register_fake("recycle::decode_step")
def _(weights, plan, base_cache, module_cache, pending, lengths, *rest) -> tuple[Tensor, Tensor]:
    return torch.empty_like(pending), torch.empty_like(lengths)


@torch.library.register_fake("recycle::prefill")
def _(*arguments) -> None:
    return None
