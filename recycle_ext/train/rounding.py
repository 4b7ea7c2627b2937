"""Weights rounded as they will be when the module runs.

A module's matrices are packed in 8 or 4 bits (packing.MODULE_DTYPES). Trained on its weights as they are then,
and with gradients as if they had not been rounded (the straight-through estimator: Bengio et al. 2013,
section 4), it learns to do without what rounding takes away.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recycle_ext.checkpoint.tensor_source import FLOAT_DTYPES

BLOCK = 32  # weights of a row that share a scale


def rounded(weight: Tensor, format: str) -> Tensor:
    """What [n, k] float32 is after packing in a format of packing.FORMATS: the numbers of the GGUF blocks of
    that name, float32. Quantised formats need k to be a multiple of 32.
    """
    if format in FLOAT_DTYPES:
        return weight.to(FLOAT_DTYPES[format]).to(weight.dtype)
    blocks = weight.unflatten(-1, (-1, BLOCK))
    if format == "q8_0":
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        quants = _over(blocks, scale)
        quants = (quants.abs() + 0.5).floor() * quants.sign()
        return (quants * _half(scale)).flatten(-2)
    if format == "q4_1":
        low, high = blocks.aminmax(dim=-1, keepdim=True)
        scale = (high - low) / 15
        quants = (_over(blocks - low, scale) + 0.5).floor().clamp(0, 15)
        return (quants * _half(scale) + _half(low)).flatten(-2)
    raise ValueError(f"no rounding to {format}")


def _over(values: Tensor, scale: Tensor) -> Tensor:
    return values * torch.where(scale == 0, 0.0, 1 / scale)


def _half(values: Tensor) -> Tensor:
    """Scales are stored in 16 bits."""
    return values.half().float()


def straight_through(weight: Tensor, format: str) -> Tensor:
    """rounded(weight), whose gradient is the weight's."""
    return weight + (rounded(weight.detach(), format) - weight.detach())
