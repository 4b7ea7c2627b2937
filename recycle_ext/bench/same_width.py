"""A GGUF file in another width, so that llama.cpp reads as many bits a weight as we do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recycle_ext.checkpoint.gguf import GgufHeader

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFReader

# Type of the layers' matrices, and of embedding and head, as in packing.DTYPES; F16 is what llama.cpp is
# at home in with 16 bits.
_TYPES = {
    "f32": ("F32", "F32"),
    "bf16": ("F16", "F16"),
    "q8": ("Q8_0", "Q8_0"),
    "q4": ("Q4_0", "Q8_0"),
}


def matrix_bytes(header: GgufHeader) -> tuple[int, str]:
    """Bytes of the matrices that a decode step reads, and their types, the commonest first."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    sizes: Counter[str] = Counter()
    for name, tensor in header.tensors.items():
        # Of an embedding beside an output matrix, a step reads one row.
        if len(tensor.shape) == 2 and not (
            name == "token_embd.weight" and "output.weight" in header.tensors
        ):
            kind = GGMLQuantizationType(tensor.ggml_type)
            block, block_bytes = GGML_QUANT_SIZES[kind]
            sizes[kind.name.lower()] += tensor.shape[0] * tensor.shape[1] // block * block_bytes
    return sizes.total(), ", ".join(name for name, _ in sizes.most_common())


def _layer_type(header: GgufHeader) -> str:
    """The type that most weights of the layers have."""
    from gguf import GGMLQuantizationType

    weights: Counter[int] = Counter()
    for name, tensor in header.tensors.items():
        if name.startswith("blk.") and len(tensor.shape) == 2:
            weights[tensor.ggml_type] += tensor.shape[0] * tensor.shape[1]
    return GGMLQuantizationType(weights.most_common(1)[0][0]).name


def write_same_width(
    source: Path, width: str, scratch: Path, note: Callable[[str], None]
) -> str | None:
    """Path of ``source`` in ``width``, written into ``scratch`` unless it is so already.

    width: of _TYPES, or "native". None, and a note, if the file cannot be written.
    """
    from gguf import GGUFReader

    header = GgufHeader(source)
    _, types = matrix_bytes(header)
    wanted = _TYPES.get(width)
    if wanted is None or set(types.upper().split(", ")) == set(wanted):
        return str(source)
    # 4 bits are 4 bits: such a file is not quantised again, as in packing.py.
    if width == "q4" and _layer_type(header).removeprefix("I").startswith("Q4"):
        return str(source)
    target = scratch / f"{source.stem}-{width}.gguf"
    note(f"writing {width} weights ({', '.join(dict.fromkeys(wanted))}) for llama.cpp")
    try:
        _convert(GGUFReader(source), target, *wanted)
    except (OSError, NotImplementedError) as error:
        note(f"llama.cpp in {width} is left out: {target} cannot be written: {error}")
        return None
    return str(target)


def _convert(reader: GGUFReader, target: Path, layer_type: str, head_type: str) -> None:
    """Copies metadata, requantises matrices, keeps vectors in float32; one tensor in memory at a time."""
    import gguf
    from gguf.quants import dequantize, quantize

    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        # What the writer writes itself, or what is no longer so.
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
        # GGUF counts dimensions from the fastest. A row that has no whole blocks stays in 16 bits.
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
