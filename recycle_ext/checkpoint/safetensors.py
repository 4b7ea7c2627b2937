"""The tensors of a safetensors file, as sources to read from."""

from __future__ import annotations

import json
from collections.abc import Container
from pathlib import Path

from safetensors import SafetensorError, safe_open

from recycle_ext.checkpoint.tensor_source import TensorSource
from recycle_ext.errors import RecycleError

_FORMATS = {"F32": ("f32", 4), "F16": ("f16", 2), "BF16": ("bf16", 2), "I64": ("i64", 8)}


def read_names(file: Path) -> list[str]:
    """Names of all tensors, of any dtype. Raises as ``read_tensors`` does."""
    return list(_header(file)[1])


def read_tensors(file: Path, only: Container[str] | None = None) -> dict[str, TensorSource]:
    """Every tensor by name. Raises RecycleError for a damaged or truncated file, and for another kind of file.

    only: the names to read; the other tensors may be of a dtype that is not supported.
    """
    start, header = _header(file)
    tensors = {}
    for name, entry in header.items():
        if only is not None and name not in only:
            continue
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        if dtype not in _FORMATS:
            raise RecycleError(f"{file}: tensor {name} is stored as {dtype}; F32, F16 and BF16 are supported")
        if len(shape) not in (1, 2):
            raise RecycleError(f"{file}: tensor {name} has shape {list(shape)}; 1 or 2 dimensions fit")
        format, item_bytes = _FORMATS[dtype]
        row_bytes = item_bytes * (shape[1] if len(shape) == 2 else 1)
        offset = start + entry["data_offsets"][0]
        tensors[name] = TensorSource(name, shape, format, file, offset, row_bytes)
    return tensors


def _header(file: Path) -> tuple[int, dict]:
    """Byte at which the first tensor starts, and the header's entry of each tensor."""
    try:
        # safe_open checks the header, and that the tensors fill the file exactly, but does not return their offsets.
        with safe_open(file, framework="pt"):
            pass
        with open(file, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
    except SafetensorError as error:
        raise RecycleError(f"{file}: not a whole safetensors file: {error}") from None
    except OSError as error:
        raise RecycleError(f"{file}: cannot be read: {error.strerror or error}") from None
    header.pop("__metadata__", None)
    return 8 + size, header
