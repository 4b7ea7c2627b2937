"""Weights rounded in training as packing rounds them for decoding.

The matrices of a module are packed in 8 or 4 bits (checkpoint.config.MODULE_DTYPES). The straight-through estimator
(Bengio et al. 2013, section 4) computes with the rounded weights and passes gradients as if nothing was rounded, so
the module learns weights that lose little when they are packed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recycle_ext.checkpoint.tensor_source import FLOAT_DTYPES

BLOCK = 32  # consecutive weights of a row that share a scale


def rounded(weight: Tensor, format: str) -> Tensor:
    """The values of ``weight`` [n, k] float32 after packing in a GGUF format: f32, f16, bf16, q8_0 or q4_1.

    -> [n, k] float32. Quantized formats need k to be a multiple of 32. Raises ValueError for other formats.
    """
    if format in FLOAT_DTYPES:
        return weight.to(FLOAT_DTYPES[format]).to(weight.dtype)
    blocks = weight.unflatten(-1, (-1, BLOCK))
    if format == "q8_0":
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        quants = _divided(blocks, scale)
        quants = (quants.abs() + 0.5).floor() * quants.sign()
        return (quants * _as_stored(scale)).flatten(-2)
    if format == "q4_1":
        low, high = blocks.aminmax(dim=-1, keepdim=True)
        scale = (high - low) / 15
        quants = (_divided(blocks - low, scale) + 0.5).floor().clamp(0, 15)
        return (quants * _as_stored(scale) + _as_stored(low)).flatten(-2)
    raise ValueError(f"no rounding to {format}")


def _divided(values: Tensor, scale: Tensor) -> Tensor:
    """values / scale as GGUF's quantizers compute it; 0 for blocks of scale 0."""
    return values * torch.where(scale == 0, 0.0, 1 / scale)


def _as_stored(values: Tensor) -> Tensor:
    """Scales and minima are stored in 16 bits."""
    return values.half().float()


def straight_through(weight: Tensor, format: str) -> Tensor:
    """rounded(weight, format), with the gradient of ``weight`` itself."""
    return weight + (rounded(weight.detach(), format) - weight.detach())
