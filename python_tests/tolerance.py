"""How far a kernel may be from the exact result: about as far as PyTorch in the same precision.

Both are compared with a float64 run, so no absolute tolerance has to be guessed. FlashAttention's tests do the same.
"""

from __future__ import annotations

import torch
from torch import Tensor


def error(given: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; infinite if either has a NaN."""
    difference = (given.double() - exact.double()).abs().max().item()
    return difference if difference == difference else float("inf")


def assert_as_good_as(ours: Tensor, native: Tensor, exact: Tensor) -> None:
    """Asserts that our error is at most twice PyTorch's ("native"), plus four roundings of the result to float32."""
    rounding = torch.finfo(torch.float32).eps * exact.double().abs().max().item()
    ours_error, native_error = error(ours, exact), error(native, exact)
    assert ours_error <= 2 * native_error + 4 * rounding, (ours_error, native_error)
