"""weights/layout.py: sizes of packed matrices, and packing piece by piece."""

from __future__ import annotations

import pytest
import torch
from formats import columns, dequantized, packed, random_matrix, random_rows
from torch.utils._python_dispatch import TorchDispatchMode

from recycle_ext import _C
from recycle_ext.errors import RecycleError
from recycle_ext.weights.layout import FORMATS, Matrix, matrix_bytes, pack_matrix, pack_rows


# A panel is 16 rows. In blocks of 32 a line of 64 bytes of scales (and minima) serves two blocks, or one where there are
# minima, and each block has 64 bytes of quants for each bit. A block of 256 has a header of scales.
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
        ("q5_0", 96, 2 * 64 + 3 * 320),
        ("q5_1", 96, 3 * (64 + 320)),
        ("iq4_nl", 96, 2 * 64 + 3 * 256),
        ("q2_k", 256, 320 + 8 * 128),
        ("q3_k", 256, 256 + 8 * 192),
        ("q4_k", 512, 2 * (320 + 8 * 256)),
        ("q5_k", 256, 320 + 8 * 320),
        ("q6_k", 256, 320 + 8 * 384),
        ("iq4_xs", 256, 192 + 8 * 256),
    ],
)
def test_matrix_bytes_are_whole_panels(format, k, panel_bytes):
    for n, panels in ((1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3)):
        assert matrix_bytes(format, n, k) == panels * panel_bytes
    matrix = Matrix(torch.zeros(panel_bytes, dtype=torch.uint8), 0, format, 3, k)
    assert matrix.panel_bytes() == panel_bytes


@pytest.mark.parametrize(
    ("format", "k", "multiple"),
    [("f32", 8, 16), ("bf16", 40, 16), ("q8_0", 48, 32), ("q4_1", 0, 32), ("q4_k", 128, 256)],
)
def test_matrix_with_rows_of_a_wrong_length_is_refused(format, k, multiple):
    with pytest.raises(ValueError, match=f"a row has {k} weights; .* multiple of {multiple}"):
        matrix_bytes(format, 16, k)


def test_unknown_format_is_refused():
    for format in ("q9_0", "q4_k"):  # q4_k: read from files alone
        with pytest.raises(RecycleError, match=f"format is '{format}'; it must be one of f32, f16, "):
            pack_matrix(torch.zeros(16, 256), format)
    with pytest.raises(ValueError, match=f"format is {len(FORMATS)}; it must be 0 to"):
        _C.matrix_bytes(len(FORMATS), 16, 32)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("k", [32, 96])
def test_matrix_packed_piece_by_piece_is_the_matrix_packed_at_once(format, k):
    n, k = 53, columns(format, k)
    rows = random_rows(format, n, k, torch.Generator().manual_seed(k))
    pieces = torch.full((matrix_bytes(format, n, k),), 255, dtype=torch.uint8)
    for start, stop in ((32, 53), (0, 16), (16, 32)):
        pack_rows(rows[start:stop], format, n, k, start, pieces)
    # Bytes beside a line of scales that no weight uses are zeros, so that equal weights have equal bytes.
    assert torch.equal(pieces, packed(rows, format, k))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("k", [32, 96, 768])
def test_unpacked_weights_are_the_exact_numbers_of_the_format(format, k):
    n, k = 53, columns(format, k)
    rows = random_rows(format, n, k, torch.Generator().manual_seed(k))
    matrix = Matrix(packed(rows, format, k), 0, format, n, k)
    exact = dequantized(rows, format)
    assert exact.unique().numel() > 100 and torch.equal(matrix.rows(torch.arange(n)), exact.float())
    assert torch.equal(matrix.unpacked(), exact.to(matrix.compute_dtype))


@pytest.mark.parametrize("format", FORMATS)
def test_packed_weights_take_at_most_3_percent_more_than_the_file(format):
    n, k = 4096, 4096
    in_file = random_rows(format, 1, k, torch.Generator()).nbytes * n
    assert in_file <= matrix_bytes(format, n, k) <= 1.03 * in_file


@pytest.mark.parametrize(("start", "stop"), [(8, 24), (0, 8), (48, 64)])
def test_piece_that_is_no_whole_panel_is_refused(start, stop):
    rows = torch.zeros(stop - start, 32)
    packed = torch.zeros(matrix_bytes("f32", 53, 32), dtype=torch.uint8)
    with pytest.raises(ValueError, match="begin at a multiple of 16 and end at one or at the last"):
        pack_rows(rows, "f32", 53, 32, start, packed)


@pytest.mark.parametrize("format", FORMATS)
def test_rows_behind_the_last_are_zero(format):
    """Their weights, not only their quants: a kernel computes whole panels."""
    k = columns(format, 96)
    weights, _ = random_matrix(format, 17, k, torch.Generator().manual_seed(2))
    matrix = Matrix(weights, 0, format, 17, k)
    whole = Matrix(matrix.weights, 0, format, 32, k)
    assert not whole.unpacked()[17:].any()
    assert whole.unpacked()[:17].any(1).all()


@pytest.mark.parametrize("format", FORMATS)
def test_matrix_inside_other_weights_is_read_from_its_offset(format):
    k = columns(format, 96)
    weights, exact = random_matrix(format, 20, k, torch.Generator().manual_seed(1))
    around = torch.cat((torch.full((128,), 255), weights, torch.full((64,), 255))).to(torch.uint8)
    matrix = Matrix(around, 128, format, 20, k)
    assert torch.equal(matrix.unpacked(), exact.to(matrix.compute_dtype))
    assert torch.equal(matrix.rows(torch.tensor([19, 0, 16])), exact[[19, 0, 16]].float())


@pytest.mark.parametrize("format", FORMATS)
def test_rows_are_gathered_without_their_panels(format):
    """An embedding lookup reads what it returns, not 16 times as much."""
    k = columns(format, 96)
    matrix = Matrix(random_matrix(format, 64, k, torch.Generator())[0], 0, format, 64, k)
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
    assert 0 < sum(gathered) <= 3 * 1.2 * matrix_bytes(format, 16, k) / 16
