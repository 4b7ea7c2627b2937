"""weights/layout.py: sizes of packed matrices, and packing piece by piece."""

from __future__ import annotations

import pytest
import torch
from test_recycle_head import dequantized
from torch.utils._python_dispatch import TorchDispatchMode

from recycle_ext import _C
from recycle_ext.errors import RecycleError
from recycle_ext.weights.layout import FORMATS, Matrix, matrix_bytes, pack_matrix, pack_rows


# A panel is 16 rows. A quantized one has lines of 64 bytes of scales (and minima): a line serves two blocks of 32
# weights in q8_0 and q4_0, one in q4_1, and each block has 512 or 256 bytes of quants.
@pytest.mark.parametrize(
    ("format", "k", "panel_bytes"),
    [
        ("f32", 16, 1024),
        ("f16", 48, 1536),
        ("bf16", 48, 1536),
        ("q8_0", 32, 64 + 512),
        ("q8_0", 64, 64 + 2 * 512),
        ("q8_0", 96, 2 * 64 + 3 * 512),
        ("q4_0", 32, 64 + 256),
        ("q4_0", 64, 64 + 2 * 256),
        ("q4_0", 96, 2 * 64 + 3 * 256),
        ("q4_1", 32, 64 + 256),
        ("q4_1", 96, 3 * (64 + 256)),
    ],
)
def test_matrix_bytes_are_whole_panels(format, k, panel_bytes):
    for n, panels in ((1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3)):
        assert matrix_bytes(format, n, k) == panels * panel_bytes
        assert pack_matrix(torch.zeros(n, k), format).shape == (panels * panel_bytes,)
    matrix = Matrix(torch.zeros(panel_bytes, dtype=torch.uint8), 0, format, 3, k)
    assert matrix.panel_bytes() == panel_bytes


@pytest.mark.parametrize(
    ("format", "k", "multiple"), [("f32", 8, 16), ("bf16", 40, 16), ("q8_0", 48, 32), ("q4_1", 0, 32)]
)
def test_matrix_with_rows_of_a_wrong_length_is_refused(format, k, multiple):
    with pytest.raises(ValueError, match=f"a row has {k} weights; .* multiple of {multiple}"):
        matrix_bytes(format, 16, k)


def test_unknown_format_is_refused():
    with pytest.raises(RecycleError, match="format is 'q5_0'; it must be one of f32, f16, "):
        pack_matrix(torch.zeros(16, 32), "q5_0")
    with pytest.raises(ValueError, match=f"format is {len(FORMATS)}; it must be 0 to"):
        _C.matrix_bytes(len(FORMATS), 16, 32)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("k", [32, 96])
def test_matrix_packed_piece_by_piece_is_the_matrix_packed_at_once(format, k):
    n = 53
    matrix = torch.randn(n, k, generator=torch.Generator().manual_seed(k))
    # Where an odd number of blocks leaves half a line of scales unused, the bytes stay as they were.
    pieces, whole = torch.full((2, matrix_bytes(format, n, k)), 255, dtype=torch.uint8)
    for start, stop in ((32, 53), (0, 16), (16, 32)):
        pack_rows(matrix[start:stop], "f32", format, n, k, start, pieces)
    pack_rows(matrix, "f32", format, n, k, 0, whole)
    assert torch.equal(pieces, whole)
    exact = dequantized(matrix, format)
    packed = Matrix(pieces, 0, format, n, k)
    assert torch.equal(packed.unpacked(), exact.to(packed.compute_dtype))


@pytest.mark.parametrize(("start", "stop"), [(8, 24), (0, 8), (48, 64)])
def test_piece_that_is_no_whole_panel_is_refused(start, stop):
    rows = torch.zeros(stop - start, 32)
    packed = torch.zeros(matrix_bytes("f32", 53, 32), dtype=torch.uint8)
    with pytest.raises(ValueError, match="begin at a multiple of 16 and end at one or at the last"):
        pack_rows(rows, "f32", "f32", 53, 32, start, packed)


@pytest.mark.parametrize("format", FORMATS)
def test_rows_behind_the_last_are_zero(format):
    """Their weights, not only their quants: a kernel computes whole panels."""
    matrix = Matrix(pack_matrix(torch.randn(17, 96), format), 0, format, 17, 96)
    whole = Matrix(matrix.weights, 0, format, 32, 96)
    assert not whole.unpacked()[17:].any()
    assert whole.unpacked()[:17].any(1).all()


@pytest.mark.parametrize("format", FORMATS)
def test_matrix_inside_other_weights_is_read_from_its_offset(format):
    weights = torch.randn(20, 96, generator=torch.Generator().manual_seed(1))
    packed = pack_matrix(weights, format)
    around = torch.cat((torch.full((128,), 255), packed, torch.full((64,), 255))).to(torch.uint8)
    matrix = Matrix(around, 128, format, 20, 96)
    exact = dequantized(weights, format)
    assert torch.equal(matrix.unpacked(), exact.to(matrix.compute_dtype))
    assert torch.equal(matrix.rows(torch.tensor([19, 0, 16])), exact[[19, 0, 16]].float())


@pytest.mark.parametrize("format", FORMATS)
def test_rows_are_gathered_without_their_panels(format):
    """An embedding lookup reads what it returns, not 16 times as much."""
    matrix = Matrix(pack_matrix(torch.randn(64, 96), format), 0, format, 64, 96)
    gathered = []

    class Gathers(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.index.Tensor:
                gathered.append(result.nbytes)
            return result

    with Gathers():
        matrix.rows(torch.tensor([3, 40, 17]))
    # A line of scales is gathered whole where it is half empty.
    assert 0 < sum(gathered) <= 3 * 1.2 * matrix_bytes(format, 16, 96) / 16
