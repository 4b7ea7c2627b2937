"""Rows of the key/value caches: head_dim floats, or 8-bit integers with their scale."""

from __future__ import annotations

import torch
from torch import Tensor

# What a cache may be kept in, by the names of the command line.
CACHE_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "q8": torch.int8}

_SCALE_BYTES = 4


def row_elements(dtype: torch.dtype, head_dim: int) -> int:
    """Size of a cache's last dimension: in int8, each row ends with the four bytes of its float32 scale."""
    return head_dim + _SCALE_BYTES if dtype == torch.int8 else head_dim


def to_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [..., head_dim] as rows of a cache. In int8 the largest value of a row becomes 127."""
    if dtype != torch.int8:
        return x.to(dtype)
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    quants = (x.float() / scale.clamp_min(1e-30)).round().to(torch.int8)
    return torch.cat((quants, scale.contiguous().view(torch.int8)), -1)


def from_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse, [..., head_dim] of ``dtype``."""
    if rows.dtype != torch.int8:
        return rows.to(dtype)
    scale = rows[..., -_SCALE_BYTES:].contiguous().view(torch.float32)
    return (rows[..., :-_SCALE_BYTES].float() * scale).to(dtype)
