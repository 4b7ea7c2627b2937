"""A GGUF file requantized to another dtype, so that llama.cpp reads as many bits per weight as recycle_ext."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recycle_ext.checkpoint.gguf import GgufHeader

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFReader

# The GGUF types of the layers' matrices, and of embedding and head, as weights/pack.py packs them. F16 stands for bf16:
# F16 is llama.cpp's usual type of 16 bits.
_TYPES = {"f32": ("F32", "F32"), "bf16": ("F16", "F16"), "q8": ("Q8_0", "Q8_0"), "q4": ("Q4_0", "Q8_0")}


def matrix_bytes(header: GgufHeader) -> tuple[int, str]:
    """Bytes of the matrices that a decode step reads, and their types by falling share of the bytes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    sizes: Counter[str] = Counter()
    for name, tensor in header.tensors.items():
        # A step reads one row of an embedding that has an output matrix beside it.
        if len(tensor.shape) == 2 and not (name == "token_embd.weight" and "output.weight" in header.tensors):
            kind = GGMLQuantizationType(tensor.ggml_type)
            block, block_bytes = GGML_QUANT_SIZES[kind]
            sizes[kind.name.lower()] += tensor.shape[0] * tensor.shape[1] // block * block_bytes
    return sizes.total(), ", ".join(name for name, _ in sizes.most_common())


def _layer_type(header: GgufHeader) -> str:
    """The commonest type of the layers' weights."""
    from gguf import GGMLQuantizationType

    weights: Counter[int] = Counter()
    for name, tensor in header.tensors.items():
        if name.startswith("blk.") and len(tensor.shape) == 2:
            weights[tensor.ggml_type] += tensor.shape[0] * tensor.shape[1]
    return GGMLQuantizationType(weights.most_common(1)[0][0]).name


def requantized_file(source: Path, dtype: str, scratch: Path, note: Callable[[str], None]) -> str | None:
    """Path of a GGUF file with the weights of ``source`` in ``dtype``: ``source`` itself, or a new file in ``scratch``.

    dtype: of _TYPES, or "native". None, and a line to ``note``, if the file cannot be written.
    """
    from gguf import GGUFReader

    header = GgufHeader(source)
    _, types = matrix_bytes(header)
    wanted = _TYPES.get(dtype)
    if wanted is None or set(types.upper().split(", ")) == set(wanted):
        return str(source)
    # A second rounding from one 4-bit type to another would lose precision and save no bytes.
    if dtype == "q4" and _layer_type(header).removeprefix("I").startswith("Q4"):
        return str(source)
    target = scratch / f"{source.stem}-{dtype}.gguf"
    note(f"writing {dtype} weights ({', '.join(dict.fromkeys(wanted))}) for llama.cpp")
    try:
        _convert(GGUFReader(source), target, *wanted)
    except (OSError, NotImplementedError) as error:  # the second: gguf cannot convert the type
        note(f"llama.cpp in {dtype} is left out: {target} cannot be written: {error}")
        return None
    return str(target)


def _convert(reader: GGUFReader, target: Path, layer_type: str, head_type: str) -> None:
    """Copies the metadata and requantizes the matrices; vectors stay float32. One tensor is in memory at a time."""
    import gguf
    from gguf.quants import dequantize, quantize

    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        # The writer writes the first two itself; the file type changes.
        if not key.startswith("GGUF.") and key not in (
            "general.architecture",
            "general.alignment",
            "general.file_type",
        ):
            is_array = field.types[0] == gguf.GGUFValueType.ARRAY
            item = field.types[-1] if is_array else None
            writer.add_key_value(key, field.contents(), field.types[0], item)

    def type_of(tensor: Any) -> GGMLQuantizationType:
        if len(tensor.shape) == 1:
            return gguf.GGMLQuantizationType.F32
        is_head = tensor.name in ("token_embd.weight", "output.weight")
        name = head_type if is_head else layer_type
        # shape[0] is the length of a row. A row that is no multiple of the block size stays in 16 bits.
        if name.startswith("Q") and tensor.shape[0] % 32:
            name = "F16"
        return gguf.GGMLQuantizationType[name]

    for tensor in reader.tensors:
        kind = type_of(tensor)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        size = tensor.n_elements // block * block_bytes
        shape = [int(n) for n in reversed(tensor.shape)]
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.write_tensor_data(quantize(values, type_of(tensor)))
    writer.close()
