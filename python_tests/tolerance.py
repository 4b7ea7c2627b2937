"""How far a kernel may be from the truth: not further than PyTorch's own arithmetic, about.

Every comparison is with a float64 run. What PyTorch loses in the precision at hand is the measure;
no absolute tolerance has to be guessed (the way FlashAttention's tests do it).
"""

from __future__ import annotations

import torch
from torch import Tensor


def error(given: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; infinite for a NaN."""
    difference = (given.double() - exact.double()).abs().max().item()
    return difference if difference == difference else float("inf")


def assert_as_good_as(ours: Tensor, native: Tensor, exact: Tensor) -> None:
    """Our error against ``exact`` is at most twice the native one's, plus four roundings of the result."""
    rounding = torch.finfo(torch.float32).eps * exact.double().abs().max().item()
    ours_error, native_error = error(ours, exact), error(native, exact)
    assert ours_error <= 2 * native_error + 4 * rounding, (ours_error, native_error)
