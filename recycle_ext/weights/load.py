"""Matrices from their files into packed weights, by all threads (csrc/cpu/load.cpp)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from recycle_ext import _C
from recycle_ext.checkpoint.tensor_source import FORMATS, TensorSource
from recycle_ext.weights.layout import PANEL_ROWS, pack_rows

# Bytes of a file between two moments at which Ctrl-C ends the load and progress is reported.
_BYTES_AT_ONCE = 1 << 26
# Values that gguf dequantizes at once; it needs several times their memory.
_VALUES_AT_ONCE = 1 << 21


@dataclass(frozen=True)
class Loader:
    """How matrices are loaded.

    threads: None: the process's number (_C.n_threads()). progress: called with the bytes of packed weights that were
    added.
    """

    threads: int | None = None
    progress: Callable[[int], object] = lambda added: None

    def load(self, source: TensorSource, format: str, packed: Tensor, ids: Tensor | None = None) -> None:
        """Packs a matrix in ``format`` into ``packed`` uint8, the whole of it.

        ids: int64; row i of the matrix is the source's row ids[i]; None: row i. Raises RecycleError where the file
        cannot be read.
        """
        n, k = source.shape[0] if ids is None else len(ids), source.shape[1]
        by_gguf = source.ggml_type is not None
        rows = _VALUES_AT_ONCE // k if by_gguf else _BYTES_AT_ONCE // source.row_bytes
        rows = max(rows // PANEL_ROWS, 1) * PANEL_ROWS
        with source.reading(), open(source.file, "rb") as file:
            for start in range(0, n, rows):
                stop = min(start + rows, n)
                if by_gguf:
                    values = _float_rows(source, start, stop, ids)
                    pack_rows(values, format, n, k, start, packed, "f32", self.threads)
                else:
                    end = _C.load_rows(
                        file=file.fileno(),
                        offset=source.offset,
                        file_rows=source.shape[0],
                        source_format=FORMATS[source.format],
                        interleaved_head_dim=source.interleaved_head_dim,
                        ids=None if ids is None else ids.numpy(),
                        format=FORMATS[format],
                        n=n,
                        k=k,
                        begin=start,
                        end=stop,
                        packed=packed.numpy(),
                        threads=self.threads,
                    )
                    if end is not None:
                        raise source.truncated(end)
                self.progress(packed.numel() * stop // n - packed.numel() * start // n)


def _float_rows(source: TensorSource, start: int, stop: int, ids: Tensor | None) -> Tensor:
    """Rows start..stop - 1 of a matrix, which are the source's rows ``ids``."""
    if ids is None:
        return source.float_rows(start, stop)
    return torch.cat([source.float_rows(row, row + 1) for row in ids[start:stop].tolist()])
