"""How a packed weight matrix lies in memory: the formats, their sizes, packing and unpacking.

csrc/include/recycle/format.h has the same layout in C++, with a picture of each format. Rows are packed in panels
of 16, and the quantized formats share a scale among 32 consecutive weights of a row (a block).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
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
        """Rows ``ids`` [m], float32 [m, k]."""
        unpacked = self._unpack(self.panels()[ids // PANEL_ROWS])
        return unpacked[torch.arange(len(ids), device=ids.device), ids % PANEL_ROWS].float()

    def unpacked(self) -> Tensor:
        """[n, k] of ``compute_dtype``."""
        return self._unpack(self.panels()).reshape(-1, self.k)[: self.n].to(self.compute_dtype)

    def linear(self, x: Tensor) -> Tensor:
        """x [rows, k] float32 -> x W^T [rows, n] float32."""
        return F.linear(x.to(self.compute_dtype), self.unpacked()).float()

    def _unpack(self, panels: Tensor) -> Tensor:
        """uint8 [panels, bytes] -> [panels, 16, k]"""
        count, k = len(panels), self.k
        if self.format in ("f32", "f16"):
            dtype = FLOAT_DTYPES[self.format]
            return panels.view(dtype).view(count, k, PANEL_ROWS).transpose(1, 2)
        if self.format == "bf16":
            pairs = panels.view(torch.bfloat16).view(count, k // 2, PANEL_ROWS, 2)
            return pairs.transpose(1, 2).reshape(count, PANEL_ROWS, k)
        # Blocks share a cache line of scales. Where k / 32 is odd, the last line is half empty.
        shared, quants = _BLOCKS_PER_LINE[self.format], _QUANT_BYTES[self.format]
        blocks = k // BLOCK
        full = blocks // shared
        group = _CACHE_LINE + shared * quants
        parts = [self._unpack_blocks(panels[:, : full * group].view(count, full, group), shared)]
        if blocks % shared:
            rest = panels[:, full * group :].reshape(count, 1, _CACHE_LINE + quants)
            parts.append(self._unpack_blocks(rest, 1))
        return torch.cat(parts, 2)

    def _unpack_blocks(self, groups: Tensor, blocks: int) -> Tensor:
        """uint8 [panels, groups, a line of scales and the quants of ``blocks`` blocks] -> [panels, 16, k]"""
        count, n_groups = groups.shape[:2]
        halves = groups[:, :, :_CACHE_LINE].contiguous().view(torch.float16).float()
        quants = groups[:, :, _CACHE_LINE:]
        if self.format == "q8_0":
            values = quants.reshape(count, n_groups, blocks, 8, PANEL_ROWS, 4).float() - 128
        else:
            packed = quants.reshape(count, n_groups, blocks, 4, PANEL_ROWS, 4)
            values = torch.stack((packed & 15, packed >> 4), 4).float()  # weights k and k + 4
            values = values.reshape(count, n_groups, blocks, 8, PANEL_ROWS, 4)
            if self.format == "q4_0":
                values -= 8
        shape = (count, n_groups, blocks, 1, PANEL_ROWS, 1)
        values *= halves[:, :, : blocks * PANEL_ROWS].reshape(shape)
        if self.format == "q4_1":
            values += halves[:, :, PANEL_ROWS:].reshape(shape)
        return values.permute(0, 4, 1, 2, 3, 5).reshape(count, PANEL_ROWS, -1)
