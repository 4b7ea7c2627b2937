"""How a packed weight matrix lies in memory: the formats, their sizes, packing and unpacking.

csrc/include/recycle/format.h has the same layout in C++, with a picture of each format. Rows are packed in panels
of 16, and the quantized formats share a scale among 32 consecutive weights of a row (a block).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recycle_ext import _C
from recycle_ext.checkpoint.tensor_source import FLOAT_DTYPES
from recycle_ext.errors import RecycleError

# Weight formats by their number in csrc/include/recycle/format.h.
FORMATS = {"f32": 0, "f16": 1, "bf16": 2, "q8_0": 3, "q4_0": 4, "q4_1": 5}

PANEL_ROWS = 16
BLOCK = 32
_CACHE_LINE = 64  # bytes
# Quantized formats: bytes of a panel's quants in one block, and the blocks that share a cache line of scales.
_QUANT_BYTES = {"q8_0": 512, "q4_0": 256, "q4_1": 256}
_BLOCKS_PER_LINE = {"q8_0": 2, "q4_0": 2, "q4_1": 1}


def matrix_bytes(format: str, n: int, k: int) -> int:
    """Bytes of a packed matrix [n, k]."""
    return _C.matrix_bytes(FORMATS[format], n, k)


def convert_rows(rows: Tensor, format: str) -> Tensor:
    """float32 [n, k] -> the rows of a format: a float tensor [n, k], or GGUF blocks, uint8."""
    if format in FLOAT_DTYPES:
        return rows.to(FLOAT_DTYPES[format])
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    kind = GGMLQuantizationType[format.upper()]
    return torch.from_numpy(np.ascontiguousarray(quantize(rows.numpy(), kind)))


def pack_rows(rows: Tensor, format: str, n: int, k: int, first: int, packed: Tensor) -> None:
    """Packs rows ``first``.. (a multiple of 16), as ``convert_rows`` returns them, into ``packed`` uint8."""
    _C.pack_rows(FORMATS[format], n, k, first, bytes_of(rows), packed.numpy())


def pack_matrix(matrix: Tensor, format: str) -> Tensor:
    """Packs one float matrix [n, k] in a format of FORMATS; uint8 [bytes], for ``recycle_head``.

    Raises RecycleError for an unknown format.
    """
    if format not in FORMATS:
        raise RecycleError(f"format is {format!r}; it must be one of {', '.join(FORMATS)}")
    n, k = matrix.shape
    packed = torch.empty(matrix_bytes(format, n, k), dtype=torch.uint8, device="cpu")
    pack_rows(convert_rows(matrix.float(), format), format, n, k, 0, packed)
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
        # Blocks share a cache line of scales. Where k / 32 is odd, the last line is half empty.
        shared, quants = _BLOCKS_PER_LINE[self.format], _QUANT_BYTES[self.format]
        blocks = k // BLOCK
        full = blocks // shared
        group = _CACHE_LINE + shared * quants
        parts = [self._unpack_blocks(panels[:, : full * group].unflatten(1, (full, group)), shared, select)]
        if blocks % shared:
            parts.append(self._unpack_blocks(panels[:, None, full * group :], 1, select))
        return torch.cat(parts, 2)

    def _unpack_blocks(self, groups: Tensor, blocks: int, select: _Select) -> Tensor:
        """uint8 [panels, groups, a line of scales and the quants of ``blocks`` blocks] -> [selected, 16 or 1, k]"""
        halves = groups[:, :, :_CACHE_LINE].view(torch.float16).unflatten(2, (2, PANEL_ROWS))
        halves = select(halves, 3).float()[:, :, :, None, :, None]
        quants = select(groups[:, :, _CACHE_LINE:].unflatten(2, (blocks, -1, PANEL_ROWS, 4)), 4)
        if self.format == "q8_0":
            values = quants.float() - 128
        else:
            values = torch.stack((quants & 15, quants >> 4), 4).flatten(3, 4).float()  # weights k and k + 4
            if self.format == "q4_0":
                values -= 8
        values *= halves[:, :, :blocks]
        if self.format == "q4_1":
            values += halves[:, :, 1:]
        return values.permute(0, 4, 1, 2, 3, 5).flatten(2)
