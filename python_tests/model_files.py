"""Model files for tests: a GGUF writer, and edits that damage a file in one way.

An edit is a function of the model's folder, so that tests can list edits as parameters.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
from gguf import GGMLQuantizationType as GgmlType
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file

from recycle_ext.errors import RecycleError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
TEXTS = [f"t{i}" for i in range(101)]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def edit_json(name="config.json", **changes):
    """Sets keys of a JSON file; None removes a key."""

    def change(folder):
        file = folder / name
        values = (json.loads(file.read_text()) if file.exists() else {}) | changes
        kept = {key: v for key, v in values.items() if changes.get(key, 0) is not None}
        file.write_text(json.dumps(kept))

    return change


def edit_tensor(name, edit, file=WEIGHTS):
    """Replaces a tensor ``t`` (None: missing) by ``edit(t)``; None removes the tensor."""

    def change(folder):
        tensors = load_file(folder / file)
        tensors[name] = edit(tensors.get(name))
        tensors = {key: t.contiguous() for key, t in tensors.items() if t is not None}
        save_file(tensors, folder / file)

    return change


def edit_bytes(name, edit):
    """Replaces a file's bytes by ``edit(bytes)``."""
    return lambda folder: (folder / name).write_bytes(edit((folder / name).read_bytes()))


def remove(name):
    """Deletes a file."""
    return lambda folder: (folder / name).unlink()


def in_turn(*changes):
    """One change that applies several."""
    return lambda folder: [change(folder) for change in changes]


def shard(folder):
    """Splits model.safetensors in two files with an index, the form of large models."""
    tensors, weight_map = load_file(folder / WEIGHTS), {}
    for i, name in enumerate(SHARDS):
        part = {key: tensors[key] for key in sorted(tensors)[i::2]}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    remove(WEIGHTS)(folder)
    edit_json(INDEX, weight_map=weight_map)(folder)


def assert_refused(open_model, file, *reasons):
    """``open_model`` raises a RecycleError that names ``file`` and has the reasons in its message."""
    with pytest.raises(RecycleError) as caught:
        open_model()
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    assert all(reason in message for reason in reasons), message


def write_gguf(file, base, kind="F32", arch=None, metadata=None, tensors=None, edit=None):
    """``base`` as llama.cpp's converter writes it, matrices in type ``kind``.

    metadata, tensors: further content by GGUF's name; None leaves an entry out. edit: applied to the finished file's
    bytes. Returns the stored values by Hugging Face's name, in Hugging Face's row order.
    """
    config, tensors = base.config, tensors or {}
    arch = arch or config.architecture.replace("mistral", "llama")
    fields = {
        f"{arch}.block_count": config.n_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.n_heads,
        f"{arch}.attention.head_count_kv": config.n_kv_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{arch}.attention.key_length": config.head_dim,
        f"{arch}.rope.dimension_count": config.head_dim,
        f"{arch}.rope.freq_base": config.rope_theta,
        "tokenizer.ggml.tokens": TEXTS,
        "tokenizer.ggml.eos_token_id": 2,
    }
    writer = gguf.GGUFWriter(file, arch)
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in (fields | (metadata or {})).items():
        if value is not None:
            add.get(type(value), writer.add_array)(key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.n_layers)
    rows, stored_types, values = {}, {}, {}
    for name, tensor in load_file(Path(base.path, WEIGHTS)).items():
        stem, dot, suffix = name.rpartition(".")
        new_name, array = names.get_name(stem) + dot + suffix, tensor.numpy()
        stored_type = GgmlType[kind] if array.ndim == 2 else GgmlType.F32
        values[name] = dequantize(quantize(array, stored_type), stored_type)
        if arch == "llama" and stem.endswith((".q_proj", ".k_proj")):
            n_head = config.n_heads if stem.endswith(".q_proj") else config.n_kv_heads
            shape = n_head, 2, len(array) // n_head // 2, array.shape[1]
            array = array.reshape(shape).swapaxes(1, 2).reshape(array.shape)
        rows[new_name], stored_types[new_name] = quantize(array, stored_type), stored_type
    for name, array in (rows | tensors).items():
        if array is not None:
            stored_type = None if name in tensors else stored_types[name]
            writer.add_tensor(name, array, raw_dtype=stored_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if edit:
        edit_bytes(file.name, edit)(file.parent)
    return values
