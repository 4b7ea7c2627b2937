"""How a packed weight matrix lies in memory: the formats, their sizes, packing and unpacking.

csrc/include/recycle/format.h has the same layout in C++, with a picture of each format. Rows are packed in panels
of 16; in the quantized formats consecutive weights of a row share a scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recycle_ext import _C
from recycle_ext.checkpoint.tensor_source import FLOAT_DTYPES, FORMATS
from recycle_ext.errors import RecycleError

# Formats that float weights are converted to. For the others there is no quantizer here: their weights come from files.
CONVERTED_TO = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")

PANEL_ROWS = 16
_CACHE_LINE = 64  # bytes


class Quantization(NamedTuple):
    """What a quantized format is made of; csrc/include/recycle/format.h says what each number means."""

    block: int
    group: int
    low_bits: int
    high_bits: int
    zero_point_bits: int
    header_bytes: int
    file_bytes: int


# Of the formats that are no floats.
QUANTIZATIONS = {
    name: Quantization(*_C.quantization(number)) for name, number in FORMATS.items() if name not in FLOAT_DTYPES
}


def matrix_bytes(format: str, n: int, k: int) -> int:
    """Bytes of a packed matrix [n, k]."""
    return _C.matrix_bytes(FORMATS[format], n, k)


def pack_rows(
    rows: Tensor,
    format: str,
    n: int,
    k: int,
    first: int,
    packed: Tensor,
    source_format: str | None = None,
    threads: int | None = None,
) -> None:
    """Packs rows ``first``.. (a multiple of 16) of a matrix [n, k] into ``packed`` uint8, the whole matrix.

    rows: a float tensor [rows, k], or the blocks of GGUF, uint8. source_format: their format, from which they are
    converted; None: ``format``. threads: None: _C.n_threads().
    """
    source = FORMATS[format if source_format is None else source_format]
    _C.pack_rows(source, bytes_of(rows), FORMATS[format], n, k, first, packed.numpy(), threads)


def pack_matrix(matrix: Tensor, format: str) -> Tensor:
    """Packs one float matrix [n, k] in a format of FORMATS; uint8 [bytes], for ``recycle_head``.

    Raises RecycleError for a format that floats are not converted to.
    """
    if format not in CONVERTED_TO:
        raise RecycleError(f"format is {format!r}; it must be one of {', '.join(CONVERTED_TO)}")
    n, k = matrix.shape
    packed = torch.empty(matrix_bytes(format, n, k), dtype=torch.uint8, device="cpu")
    pack_rows(matrix.float(), format, n, k, 0, packed, "f32")
    return packed


def bytes_of(tensor: Tensor) -> np.ndarray:
    """The tensor's bytes, uint8 [bytes]."""
    return tensor.contiguous().view(torch.uint8).numpy()


# (a view of the panels, its dimension of 16 rows) -> the same with the panels, or with single rows, that are wanted.
_Select = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Matrix:
    """A packed matrix [n, k] inside the byte tensor of all weights."""

    weights: Tensor  # uint8 [bytes]
    offset: int  # bytes
    format: str
    n: int
    k: int

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of matmuls with the unpacked matrix: float32 for f32 and f16, else bfloat16."""
        return torch.float32 if self.format in ("f32", "f16") else torch.bfloat16

    def panel_bytes(self) -> int:
        """Bytes of 16 rows."""
        return matrix_bytes(self.format, PANEL_ROWS, self.k)

    def panels(self) -> Tensor:
        """uint8 [panels, panel_bytes]; the last panel is filled up with zero rows."""
        count, size = -(-self.n // PANEL_ROWS), self.panel_bytes()
        return self.weights[self.offset : self.offset + count * size].view(count, size)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows ``ids`` [m], float32 [m, k]. Reads those rows alone, not the panels they are in."""
        panel, lane = ids // PANEL_ROWS, ids % PANEL_ROWS
        rows = self._unpack(lambda view, dim: view.movedim(dim, 1)[panel, lane].unsqueeze(dim))
        return rows[:, 0].float()

    def unpacked(self) -> Tensor:
        """[n, k] of ``compute_dtype``."""
        panels = self._unpack(lambda view, dim: view)
        return panels.reshape(-1, self.k)[: self.n].to(self.compute_dtype)

    def _unpack(self, select: _Select) -> Tensor:
        """What ``select`` takes of the panels: [selected, 16 or 1, k]"""
        panels, k = self.panels(), self.k
        if self.format in FLOAT_DTYPES:
            neighbours = 2 if self.format == "bf16" else 1
            values = panels.view(FLOAT_DTYPES[self.format]).view(-1, k // neighbours, PANEL_ROWS, neighbours)
            return select(values, 2).transpose(1, 2).flatten(2)
        q = QUANTIZATIONS[self.format]
        quant_bytes = (q.low_bits + q.high_bits) * _CACHE_LINE  # of 32 columns
        if q.block == 256:
            blocks = panels.unflatten(1, (k // 256, -1))
            return self._unpack_blocks(blocks[:, :, : q.header_bytes], blocks[:, :, q.header_bytes :], 8, select)
        # Blocks of 32 share a cache line of scales. Where k / 32 is odd, the last line is half empty.
        shared = 1 if q.zero_point_bits < 0 else 2
        full = k // 32 // shared
        size = _CACHE_LINE + shared * quant_bytes
        parts = [panels[:, : full * size].unflatten(1, (full, size)), panels[:, None, full * size :]]
        return torch.cat(
            [
                self._unpack_blocks(part[:, :, :_CACHE_LINE], part[:, :, _CACHE_LINE:], count, select)
                for part, count in zip(parts, (shared, 1), strict=True)
                if part.numel()
            ],
            2,
        )

    def _unpack_blocks(self, header: Tensor, quants: Tensor, blocks: int, select: _Select) -> Tensor:
        """Scales uint8 [panels, groups, bytes], then quants of 32 ``blocks`` columns -> [selected, 16 or 1, k]"""
        q = QUANTIZATIONS[self.format]
        values = _fields(quants, blocks, 0, q.low_bits, select)
        if q.high_bits:
            values |= _fields(quants, blocks, q.low_bits, q.high_bits, select) << q.low_bits
        halves = select(header[:, :, :_CACHE_LINE].view(torch.float16).unflatten(2, (2, PANEL_ROWS)), 3).float()
        scale, minimum = halves[:, :, :blocks], halves[:, :, 1:]
        if q.block == 256:
            integers = select(header[:, :, _CACHE_LINE:].unflatten(2, (-1, PANEL_ROWS)), 3)
            group_scale, group_minimum = _group_scales(self.format, integers)
            scale, minimum = halves[:, :, :1] * group_scale, -minimum * group_minimum
        if self.format in ("iq4_nl", "iq4_xs"):
            values = torch.tensor(_IQ4_VALUES, dtype=torch.float32, device=values.device).take(values.long())
        else:
            values = values.float() - (0 if q.zero_point_bits < 0 else 1 << q.zero_point_bits)
        # Four columns in a row are a quad: [selected, groups, scales, quads, 16 or 1, 4].
        values = values.flatten(2, 3).unflatten(2, (-1, q.group // 4)) * scale[:, :, :, None, :, None]
        if q.zero_point_bits < 0:
            values += minimum[:, :, :, None, :, None]
        return values.permute(0, 4, 1, 2, 3, 5).flatten(2)


# iq4_value() of csrc/include/recycle/format.h
_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _fields(quants: Tensor, blocks: int, first_line: int, bits: int, select: _Select) -> Tensor:
    """The ``bits`` bits of quants from a cache line on, uint8 [selected, groups, blocks, 8 quads, 16 or 1, 4]."""
    lines = quants.unflatten(2, (blocks, -1, PANEL_ROWS, 4))[:, :, :, first_line : first_line + bits]
    lines = select(lines, 4)
    return torch.stack([lines >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)], 4).flatten(3, 4)


def _group_scales(format: str, integers: Tensor) -> tuple[Tensor, Tensor | int]:
    """group_scale() of csrc/include/recycle/format.h: uint8 [selected, blocks, rows, 16 or 1] -> scales and minima."""
    if format in ("q4_k", "q5_k"):
        return integers[:, :, ::2], integers[:, :, 1::2]
    if format == "q2_k":
        return integers & 15, integers >> 4
    if format == "q3_k":
        low = torch.cat((integers[:, :, :8] & 15, integers[:, :, :8] >> 4), 2)
        high = torch.cat([integers[:, :, 8:] >> shift & 3 for shift in (0, 2, 4, 6)], 2)
        return (low | high << 4).float() - 32, 0
    return integers.view(torch.int8), 0
