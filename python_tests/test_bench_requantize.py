"""GGUF files requantized for llama.cpp: values, metadata, and the bytes of a step."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from recycle_ext.bench.requantize import matrix_bytes, requantized_file
from recycle_ext.checkpoint.gguf import GgufHeader


def write_gguf(file: Path, kind: str) -> dict[str, np.ndarray]:
    """Writes matrices of a GGUF type and a vector, without a model's metadata; returns their values."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "ü"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5, 2.5])
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    generator = np.random.default_rng(0)
    values = {}
    for name, shape in {
        "token_embd.weight": (48, 64),
        "blk.0.attn_q.weight": (32, 64),
        "blk.0.ffn_down.weight": (16, 80),  # a row is no multiple of a block
        "output_norm.weight": (64,),
    }.items():
        array = generator.standard_normal(shape, dtype=np.float32)
        blocks = len(shape) == 2 and shape[1] % 32 == 0
        type_ = gguf.GGMLQuantizationType[kind if blocks else "F32"]
        data = gguf.quants.quantize(array, type_)
        values[name] = gguf.quants.dequantize(data, type_)
        writer.add_tensor(name, data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.mark.parametrize(
    ("dtype", "types"),
    [("bf16", "F16 F16 F16"), ("q8", "Q8_0 Q8_0 F16"), ("q4", "Q8_0 Q4_0 F16"), ("f32", "F32 F32 F32")],
)
def test_requantized_file_keeps_values_and_metadata(tmp_path, dtype, types):
    values = write_gguf(tmp_path / "model.gguf", "F16")
    (tmp_path / "scratch").mkdir()
    file = requantized_file(tmp_path / "model.gguf", dtype, tmp_path / "scratch", print)
    reader = gguf.GGUFReader(file)
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "b", "ü"]
    assert reader.fields["tokenizer.ggml.scores"].contents() == [0.5, 1.5, 2.5]
    assert reader.fields["tokenizer.ggml.add_bos_token"].contents() is False
    assert [tensor.name for tensor in reader.tensors] == list(values)
    for tensor, kind in zip(reader.tensors, [*types.split(), "F32"], strict=True):
        assert tensor.tensor_type.name == kind
        there = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        error = 0.3 if kind == "Q4_0" else 0.02
        assert np.abs(there - values[tensor.name]).max() < error


def test_file_that_has_the_dtype_is_not_copied(tmp_path):
    for kind, dtype in (("Q4_1", "q4"), ("Q4_0", "native"), ("Q8_0", "native")):
        file = tmp_path / f"{kind}.gguf"
        write_gguf(file, kind)
        assert requantized_file(file, dtype, tmp_path, print) == str(file)


def test_matrix_bytes_of_a_file_are_those_of_a_step(tmp_path):
    write_gguf(tmp_path / "model.gguf", "Q8_0")
    size, types = matrix_bytes(GgufHeader(tmp_path / "model.gguf"))
    assert size == (48 + 32) * 64 // 32 * 34 + 16 * 80 * 4
    assert types == "q8_0, f32"
