"""Training with rounded weights: they are the weights that packing stores."""

import pytest
import torch

from recycle_ext.checkpoint.config import MODULE_DTYPES
from recycle_ext.train.rounding import rounded, straight_through
from recycle_ext.weights.layout import Matrix, pack_matrix

FORMATS = sorted({layers for layers, _ in MODULE_DTYPES.values()})


def weights(rows: int = 7, columns: int = 96) -> torch.Tensor:
    """Weights of several magnitudes, with a block of zeros, one of a single value, and one of very small numbers."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(5))
    values *= torch.logspace(-4, 2, rows)[:, None]
    values[1, :32] = 0
    values[2, 32:64] = 0.75
    values[3, 64:] *= 1e-6
    return values


@pytest.mark.parametrize("format", FORMATS)
def test_rounded_weights_equal_packed_weights(format):
    packed = Matrix(pack_matrix(weights(), format), 0, format, *weights().shape)
    assert torch.equal(rounded(weights(), format), packed.rows(torch.arange(len(weights()))))


@pytest.mark.parametrize("format", FORMATS)
def test_straight_through_gradient_equals_that_of_unrounded_weights(format):
    weight = weights().requires_grad_()
    other = torch.randn(weight.shape, generator=torch.Generator().manual_seed(6))
    (straight_through(weight, format) * other).sum().backward()
    torch.testing.assert_close(weight.grad, other, rtol=0, atol=0)
