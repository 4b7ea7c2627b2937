"""A tensor that is still in its file: its shape and format, and its rows on demand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from recycle_ext import _C
from recycle_ext.errors import RecycleError

# Weight formats by their number in csrc/include/recycle/format.h.
_NAMES = "f32 f16 bf16 q8_0 q4_0 q4_1 q5_0 q5_1 iq4_nl q2_k q3_k q4_k q5_k q6_k iq4_xs"
FORMATS = {name: number for number, name in enumerate(_NAMES.split())}
FLOAT_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# GGUF's number of a quantized type, and the values and bytes of one of its blocks.
BLOCKS = {
    "q8_0": (8, 32, 34),
    "q4_0": (2, 32, 18),
    "q4_1": (3, 32, 20),
    "q5_0": (6, 32, 22),
    "q5_1": (7, 32, 24),
    "iq4_nl": (20, 32, 18),
    "q2_k": (10, 256, 84),
    "q3_k": (11, 256, 110),
    "q4_k": (12, 256, 144),
    "q5_k": (13, 256, 176),
    "q6_k": (14, 256, 210),
    "iq4_xs": (23, 256, 136),
}


@dataclass(frozen=True)
class TensorSource:
    """A matrix [n_out, n_in] or a vector [n] in a file. Rows are counted along the first dimension."""

    name: str
    shape: tuple[int, ...]
    # A name in FLOAT_DTYPES or BLOCKS, or "i64" for lists of token ids. Other GGUF types are dequantized on reading and
    # say "f32".
    format: str
    file: Path
    offset: int  # in bytes, of the first row
    row_bytes: int
    # Number of the GGUF type that is dequantized on reading.
    ggml_type: int | None = None
    # llama.cpp stores the rows of q and k of each head in the order 0, h/2, 1, h/2 + 1, ... (h is this
    # number, the head size), for its interleaved RoPE. 0: rows are in Hugging Face's order.
    interleaved_head_dim: int = 0

    def raw_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop - 1 as stored.

        Float formats: [rows, n_in] (a vector: [rows]) of that dtype. Block formats: uint8 [rows, row_bytes], the
        blocks of GGUF untouched. Raises RecycleError where the file cannot be read.
        """
        data = self._stored_rows(start, stop)
        if self.ggml_type is not None:
            return _dequantized_by_gguf(data, self.ggml_type)
        if self.format in BLOCKS:
            return data
        dtype = torch.int64 if self.format == "i64" else FLOAT_DTYPES[self.format]
        return data.view(dtype).view(-1, *self.shape[1:])

    def float_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop - 1 as float32, [rows, n_in] (a vector: [rows])."""
        rows = self.raw_rows(start, stop)
        if self.format not in BLOCKS:
            return rows.float()
        values = torch.empty(len(rows), self.shape[1])
        _C.dequantize_rows(FORMATS[self.format], self.shape[1], rows.numpy(), values.numpy())
        return values

    def to(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The whole tensor."""
        read = self.float_rows if self.format in BLOCKS else self.raw_rows
        return read(0, self.shape[0]).to(dtype)

    def _stored_rows(self, start: int, stop: int) -> torch.Tensor:
        """uint8 [stop - start, row_bytes], in Hugging Face's order of rows."""
        size = self.interleaved_head_dim
        if not size:
            return self._read(start, stop)
        first, last = start // size * size, -(-stop // size) * size
        heads = self._read(first, last).view(-1, size // 2, 2, self.row_bytes).transpose(1, 2)
        return heads.reshape(-1, self.row_bytes)[start - first : stop - first].contiguous()

    def _read(self, start: int, stop: int) -> torch.Tensor:
        """uint8 [stop - start, row_bytes], in the file's order of rows."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"{self.name}: rows {start}..{stop} of {self.shape[0]}")
        offset, size = self.offset + start * self.row_bytes, (stop - start) * self.row_bytes
        with self.reading():
            data = np.fromfile(self.file, np.uint8, size, offset=offset)
        if len(data) < size:
            raise self.truncated(offset + len(data))
        return torch.from_numpy(data).view(-1, self.row_bytes)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turns a failure of the system to read the file into a RecycleError with the reason."""
        try:
            yield
        except OSError as error:
            raise RecycleError(f"{self.file}: cannot be read: {error.strerror}") from None

    def truncated(self, end: int) -> RecycleError:
        """The error where the file, which was longer when it was opened, ends at byte ``end``."""
        missing = self.offset + self.shape[0] * self.row_bytes - end
        return RecycleError(f"{self.file}: the file ends at byte {end}, {missing} bytes before the end of a tensor")


def ggml_type_name(number: int) -> str:
    """The name of a GGUF type, "IQ2_XS"; "number 99" for one that gguf does not know."""
    from gguf import GGMLQuantizationType

    return {int(kind): kind.name for kind in GGMLQuantizationType}.get(number, f"number {number}")


def _dequantized_by_gguf(rows: torch.Tensor, ggml_type: int) -> torch.Tensor:
    """uint8 [rows, row_bytes] of a GGUF type without a format -> float32 [rows, n_in]."""
    # Imported here: the import takes 0.2 s, and most models never need it.
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    return torch.from_numpy(dequantize(rows.numpy(), GGMLQuantizationType(ggml_type)))
