"""Models on disk: what is read is what was written, and what cannot be read is refused by name."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GgmlType
from gguf.quants import dequantize, quantize
from models import ARCHITECTURES, random_tensors, write_base, write_module
from safetensors.torch import load_file, save_file

from recycle_ext.checkpoint.base_model import open_checkpoint
from recycle_ext.checkpoint.config import RopeScaling
from recycle_ext.checkpoint.module import open_module, save_module
from recycle_ext.checkpoint.shapes import module_shapes
from recycle_ext.errors import RecycleError
from recycle_ext.weights.pack import pack_model

FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
GGUF_ARCHITECTURES = ["llama", "qwen2", "qwen3"]
KEPT_TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
BAD_SCALING = {key: "8" for key in LLAMA3 if key != "rope_type"}
TEXTS = [f"t{i}" for i in range(101)]
BAD_TOKENS = {"tokenizer.ggml.tokens": 3, "tokenizer.ggml.eos_token_id": None}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MODULE_WEIGHTS = "module.safetensors"
MODULES = [{}, {"norms": False, "input_bias": True}, {"n_layers": 2, "draft_vocab_size": 20}]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
Q_PROJ, UP_PROJ = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"
Q_BIAS, NORM = "model.layers.0.self_attn.q_proj.bias", "model.norm.weight"


def edit_json(name="config.json", **changes):
    """Sets keys; None removes one."""

    def change(folder):
        file = folder / name
        values = (json.loads(file.read_text()) if file.exists() else {}) | changes
        kept = {key: v for key, v in values.items() if changes.get(key, 0) is not None}
        file.write_text(json.dumps(kept))

    return change


def edit_tensor(name, edit, file=WEIGHTS):
    """Replaces a tensor by what ``edit`` makes of it; None removes it."""

    def change(folder):
        tensors = load_file(folder / file)
        tensors[name] = edit(tensors.get(name))
        tensors = {key: t.contiguous() for key, t in tensors.items() if t is not None}
        save_file(tensors, folder / file)

    return change


edit_module = functools.partial(edit_tensor, file=MODULE_WEIGHTS)


def edit_bytes(name, edit):
    return lambda folder: (folder / name).write_bytes(edit((folder / name).read_bytes()))


def remove(name):
    return lambda folder: (folder / name).unlink()


def shard(folder):
    """Splits model.safetensors in two, as large models are."""
    tensors, weight_map = load_file(folder / WEIGHTS), {}
    for i, name in enumerate(SHARDS):
        part = {key: tensors[key] for key in sorted(tensors)[i::2]}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    remove(WEIGHTS)(folder)
    edit_json(INDEX, weight_map=weight_map)(folder)


def in_turn(*changes):
    return lambda folder: [change(folder) for change in changes]


def assert_refused(open_model, file, *reasons):
    with pytest.raises(RecycleError) as caught:
        open_model()
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    assert all(reason in message for reason in reasons), message


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_directory_gives_every_tensor_as_it_was_saved(tmp_path, architecture, tied, dtype):
    write_base(tmp_path, architecture, tied=tied)
    file = tmp_path / WEIGHTS
    saved = {name: tensor.to(FLOATS[dtype]) for name, tensor in load_file(file).items()}
    save_file(saved, file)
    base = open_checkpoint(tmp_path)
    assert base.tensors.keys() == saved.keys()
    assert ("lm_head.weight" in base.tensors) != tied
    for name, tensor in saved.items():
        source = base.tensors[name]
        assert source.format == dtype
        assert torch.equal(source.raw_rows(0, len(tensor)), tensor)
        assert torch.equal(source.float_rows(1, 5), tensor[1:5].float())


def test_shards_are_one_model(tmp_path):
    whole = write_base(tmp_path).state_dict()
    shard(tmp_path)
    parts = open_checkpoint(tmp_path)
    assert {source.file.name for source in parts.tensors.values()} == set(SHARDS)
    assert parts.tensors.keys() == whole.keys()
    assert all(torch.equal(parts.tensors[name].to(), tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("scaling", [{}, LLAMA3])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rope_frequencies_are_those_of_transformers(tmp_path, key, scaling, theta):
    pytest.importorskip("transformers", reason="the extra `test` brings it")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    write_base(tmp_path)
    if key == "rope_scaling":
        edit_json(rope_theta=theta, rope_scaling=scaling or None)(tmp_path)
    else:
        scaling = {"rope_type": "default"} | scaling
        edit_json(rope_theta=None, rope_parameters={"rope_theta": theta} | scaling)(tmp_path)
    theirs = LlamaRotaryEmbedding(LlamaConfig.from_pretrained(tmp_path)).inv_freq
    ours = open_checkpoint(tmp_path).config.inv_freq()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_null_in_config_json_is_as_good_as_absent(tmp_path):
    config = write_base(tmp_path).config
    keys = ("head_dim", "rope_scaling", "rope_parameters", "quantization_config")
    values = json.loads((tmp_path / "config.json").read_text()) | dict.fromkeys(keys)
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert open_checkpoint(tmp_path).config == config


@pytest.mark.parametrize(
    ("config", "generation_config", "expected"),
    [
        (2, None, (2,)),
        ([2, 7], None, (2, 7)),
        (2, 7, (2, 7)),
        (2, [7, 2, 9], (2, 7, 9)),
        (None, [7], (7,)),
        (None, None, ()),
    ],
)
def test_eos_ids_of_a_directory(tmp_path, config, generation_config, expected):
    write_base(tmp_path)
    edit_json(eos_token_id=config)(tmp_path)
    edit_json("generation_config.json", eos_token_id=generation_config)(tmp_path)
    assert open_checkpoint(tmp_path).config.eos_token_ids == expected


@pytest.mark.parametrize(
    ("change", "name", "reason"),
    [
        (shutil.rmtree, "", "no such file or directory"),
        (remove("config.json"), "config.json", "No such file"),
        (edit_bytes("config.json", lambda data: data[:-9]), "config.json", "not JSON"),
        (edit_json(architectures=["GPT2LMHeadModel"]), "config.json", "['GPT2LMHeadModel']"),
        (edit_json(architectures=[["LlamaForCausalLM"]]), "config.json", '"architectures" is [['),
        (edit_json(vocab_size=None), "config.json", '"vocab_size" is missing'),
        (edit_json(num_key_value_heads=3), "", "4 heads cannot share 3"),
        (edit_json(head_dim=15), "", "head_dim is 15"),
        (edit_json(num_hidden_layers=10**9), "", "1000000000 layers"),
        (edit_json(quantization_config={"quant_method": "gptq"}), "config.json", "is 'gptq'"),
        (edit_json(rope_scaling={"type": "yarn"}), "config.json", "\"rope_scaling\" is 'yarn'"),
        (edit_json(rope_parameters={"rope_type": "dynamic"}), "config.json", "is 'dynamic'"),
        (edit_json(rope_scaling=LLAMA3 | {"factor": None}), "config.json", "factor is None"),
        (edit_json(rope_theta=0), "config.json", '"rope_theta" is 0'),
        (edit_json(attention_bias=True), "config.json", '"attention_bias" is True'),
        (edit_json(mlp_bias=True), "config.json", '"mlp_bias" is True'),
        (edit_json(eos_token_id="</s>"), "config.json", "\"eos_token_id\" is '</s>'"),
        (edit_bytes(WEIGHTS, lambda data: data[:-1]), WEIGHTS, "not a whole safetensors file"),
        (edit_bytes(WEIGHTS, lambda data: data[:99]), WEIGHTS, "not a whole safetensors file"),
        (remove(WEIGHTS), "", "no model.safetensors"),
        (lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"), "", "weights are in .bin files"),
        (in_turn(shard, remove(SHARDS[1])), SHARDS[1], "No such file"),
        (in_turn(shard, edit_tensor(Q_PROJ, lambda _: None, SHARDS[0])), SHARDS[0], Q_PROJ),
        (in_turn(shard, edit_json(INDEX, weight_map={NORM: 1})), INDEX, '"weight_map" must name'),
        (edit_tensor(UP_PROJ, lambda _: None), "", f"tensor {UP_PROJ} is missing"),
        (edit_json(tie_word_embeddings=False), "", "tensor lm_head.weight is missing"),
        (edit_tensor(NORM, lambda t: t[:63]), WEIGHTS, f"tensor {NORM} has shape [63]"),
        (edit_tensor(UP_PROJ, torch.t), WEIGHTS, f"{UP_PROJ} has shape [64, 96]"),
        (edit_tensor(NORM, torch.Tensor.int), WEIGHTS, f"tensor {NORM} is stored as I32"),
        (edit_tensor(NORM, torch.Tensor.long), WEIGHTS, f"tensor {NORM} is stored as I64"),
        (edit_tensor(NORM, torch.Tensor.double), WEIGHTS, f"tensor {NORM} is stored as F64"),
        (edit_json(architectures=["Qwen2ForCausalLM"]), "", f"tensor {Q_BIAS} is missing"),
        (edit_tensor(Q_BIAS, lambda _: torch.ones(64)), WEIGHTS, f"tensor {Q_BIAS} has no place"),
    ],
)
def test_a_directory_that_cannot_be_read_is_refused(tmp_path, change, name, reason):
    write_base(tmp_path)
    change(tmp_path)
    assert_refused(lambda: open_checkpoint(tmp_path), tmp_path / name, reason)


def write_gguf(file, base, kind="F32", arch=None, metadata=None, tensors=None, edit=None):
    """``base`` as llama.cpp's converter writes it, matrices in type ``kind``.

    metadata, tensors: what else to write, by GGUF's name; None leaves something out. edit: what to do
    to the finished file's bytes. Returns the stored values by Hugging Face's name, in its row order.
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


@pytest.mark.parametrize("kind", KEPT_TYPES + ["Q5_0"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", GGUF_ARCHITECTURES)
def test_a_gguf_file_gives_every_tensor_as_it_was_stored(tmp_path, architecture, tied, kind):
    """llama's q and k are written permuted and come back in Hugging Face's order; qwen's never move."""
    hf = write_base(tmp_path / "hf", architecture, tied=tied)
    values = write_gguf(tmp_path / "model.gguf", hf, kind)
    base = open_checkpoint(tmp_path / "model.gguf")
    assert base.tensors.keys() == values.keys()
    for name, expected in values.items():
        assert np.array_equal(base.tensors[name].to().numpy(), expected), name
        if expected.ndim == 2:
            kept = kind.lower() if kind in KEPT_TYPES else "f32"
            assert base.tensors[name].format == kept


@pytest.mark.parametrize("rows", [(0, 32), (0, 1), (3, 5), (15, 17), (16, 32), (7, 30)])
@pytest.mark.parametrize("kind", ["BF16", "Q4_1", "Q5_0"])
@pytest.mark.parametrize("architecture", GGUF_ARCHITECTURES)
def test_rows_of_k_are_in_order_wherever_they_start(tmp_path, architecture, kind, rows):
    hf = write_base(tmp_path / "hf", architecture)
    name = "model.layers.1.self_attn.k_proj.weight"
    start, stop = rows
    values = write_gguf(tmp_path / "model.gguf", hf, kind)[name][start:stop]
    source = open_checkpoint(tmp_path / "model.gguf").tensors[name]
    assert np.array_equal(source.float_rows(start, stop).numpy(), values)
    raw = source.raw_rows(start, stop)
    if kind == "Q4_1":
        # Blocks lie within a row, so those of a row are the same wherever it is stored.
        blocks = quantize(hf.tensors[name].to().numpy(), GgmlType.Q4_1)
        assert np.array_equal(raw.numpy(), blocks[start:stop])
    else:
        assert raw.dtype == (torch.bfloat16 if kind == "BF16" else torch.float32)
        assert np.array_equal(raw.float().numpy(), values)


def test_sizes_of_a_gguf_file_are_those_of_the_directory(tmp_path):
    hf = write_base(tmp_path / "hf", tied=False)
    write_gguf(tmp_path / "tiny.gguf", hf, metadata={"tokenizer.ggml.bos_token_id": 1})
    config = open_checkpoint(tmp_path / "tiny.gguf").config
    assert config.name == "tiny"
    assert config.rms_norm_eps == pytest.approx(hf.config.rms_norm_eps)
    same = {"name": "hf", "rms_norm_eps": hf.config.rms_norm_eps}
    assert dataclasses.replace(config, **same) == hf.config


def test_rope_freqs_divide_the_frequencies(tmp_path):
    hf = write_base(tmp_path / "hf")
    factors = np.linspace(1, 8, hf.config.head_dim // 2, dtype=np.float32)
    write_gguf(tmp_path / "model.gguf", hf, tensors={"rope_freqs.weight": factors})
    base = open_checkpoint(tmp_path / "model.gguf")
    assert base.config.rope_freq_factors == tuple(factors.tolist())
    assert torch.equal(base.config.inv_freq(), hf.config.inv_freq() / torch.from_numpy(factors))
    assert base.tensors.keys() == hf.tensors.keys()


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, (2,)),
        ({"eot_token_id": 5}, (2, 5)),
        ({"tokens": TEXTS[:9] + ["<|im_end|>"] + TEXTS[10:]}, (2, 9)),
        ({"eos_token_id": None}, ()),
        ({"eos_token_id": None, "tokens": None}, ()),
    ],
)
def test_eos_ids_of_a_gguf_file(tmp_path, metadata, expected):
    metadata = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    write_gguf(tmp_path / "model.gguf", write_base(tmp_path / "hf"), metadata=metadata)
    assert open_checkpoint(tmp_path / "model.gguf").config.eos_token_ids == expected


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"edit": lambda data: b"PK\3\4" + data[4:]}, "not a GGUF file"),
        ({"edit": lambda data: data[:2000]}, "ends in the middle of its header"),
        ({"edit": lambda data: data[:4] + b"\1" + data[5:]}, "GGUF version 1"),
        ({"edit": lambda data: data[:-500]}, "the file is truncated: tensor"),
        ({"edit": lambda data: data[: len(data) // 2]}, "the file is truncated: tensor"),
        ({"edit": lambda data: data.replace(b"llama.block", b"\xff" * 11)}, "header is damaged"),
        ({"edit": lambda data: data.replace(b"weight\2", b"weight\0")}, "has 0 dimensions"),
        ({"edit": lambda data: data.replace(b"weight\2", b"weight\5")}, "has 5 dimensions"),
        ({"arch": "phi3"}, "architecture 'phi3' is not supported"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "RoPE scaling 'yarn'"),
        ({"metadata": {"llama.expert_count": 8}}, "mixture-of-experts"),
        ({"metadata": {"split.count": 2}}, "one part of a split model"),
        ({"metadata": {"llama.block_count": None}}, "llama.block_count is missing"),
        ({"metadata": {"llama.block_count": 2**31}}, "2147483648 layers"),
        ({"metadata": {"llama.attention.head_count": 0}}, "with 0 heads"),
        ({"metadata": {"llama.attention.head_count": [4, 4]}}, "is 'an array of 2', not int"),
        ({"metadata": {"llama.attention.value_length": 8}}, "value_length is 8; only 16"),
        ({"metadata": {"llama.rope.freq_base": 0.0}}, "rope_theta is 0.0"),
        ({"metadata": {"tokenizer.ggml.eos_token_id": 101}}, "is 101, of 101 tokens"),
        ({"metadata": BAD_TOKENS}, "tokens is missing or no array of strings"),
        ({"tensors": {"token_embd.weight": None}}, "tensor token_embd.weight is missing"),
        ({"tensors": {"blk.1.ffn_up.weight": None}}, f"tensor {UP_PROJ} is missing"),
        ({"tensors": {"output_norm.weight": np.ones(63, "f")}}, f"{NORM} has shape [63]"),
        ({"tensors": {"output_norm.weight": np.ones(64)}}, "output_norm.weight has type F64"),
        ({"tensors": {"blk.0.ffn_gate_inp.weight": np.ones((4, 64), "f")}}, "has no place"),
        ({"tensors": {"rope_freqs.weight": np.ones(7, "f")}}, "rope_freqs.weight is f32 [7]"),
    ],
)
def test_a_gguf_file_that_cannot_be_read_is_refused(tmp_path, options, reason):
    file = tmp_path / "model.gguf"
    write_gguf(file, write_base(tmp_path / "hf"), **options)
    assert_refused(lambda: open_checkpoint(file), file, reason)


@pytest.mark.parametrize("damage", ["flipped", "cut"])
@pytest.mark.parametrize("kind", ["F32", "Q5_0"])
def test_a_damaged_gguf_file_opens_or_is_refused(tmp_path, kind, damage):
    """Never another exception, nor one when the tensors are then read."""
    file = tmp_path / "model.gguf"
    hf = write_base(tmp_path / "hf", vocab_size=32, n_layers=1)
    write_gguf(file, hf, kind, metadata={"tokenizer.ggml.tokens": TEXTS[:32]})
    data = file.read_bytes()
    header = min(source.offset for source in open_checkpoint(file).tensors.values())
    chance, refused = random.Random(0), 0
    for _ in range(200):
        variant = bytearray(data)
        if damage == "cut":
            del variant[chance.randrange(chance.choice([header, len(data)])) :]
        else:
            for _ in range(chance.randint(1, 4)):
                variant[chance.randrange(4, header)] ^= 1 << chance.randrange(8)
        file.write_bytes(variant)
        try:
            base = open_checkpoint(file)
            base.state_dict()
            assert len(base.fingerprint) == 64
        except RecycleError as error:
            assert str(file) in str(error)
            refused += 1
    assert refused == 200 if damage == "cut" else 0 < refused < 200


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q4_0", "Q5_0"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_has_one_fingerprint_in_every_format(tmp_path, architecture, kind):
    hf = write_base(tmp_path / "hf", architecture)
    write_gguf(tmp_path / "model.gguf", hf, kind)
    assert open_checkpoint(tmp_path / "model.gguf").fingerprint == hf.fingerprint


@pytest.mark.parametrize("name", [NORM, "model.layers.1.self_attn.q_norm.weight"])
def test_one_norm_weight_makes_another_fingerprint(tmp_path, name):
    hf = write_base(tmp_path / "hf", "qwen3")
    before = hf.fingerprint
    edit_tensor(name, lambda t: t + 1e-6 * torch.eye(len(t))[3])(tmp_path / "hf")
    write_gguf(tmp_path / "model.gguf", hf, "Q8_0")
    after = open_checkpoint(tmp_path / "hf").fingerprint
    assert after != before
    assert open_checkpoint(tmp_path / "model.gguf").fingerprint == after


@pytest.mark.parametrize("options", MODULES)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_saved_module_comes_back_bit_for_bit(tmp_path, architecture, options):
    base = write_base(tmp_path / "base", architecture)
    config = write_module(tmp_path / "module", base, **options).config
    config = dataclasses.replace(
        config,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
        zero_first_embedding=True,
        module_dtype="q4",
    )
    tensors = random_tensors(module_shapes(config), seed=5)
    if config.draft_vocab_size:
        tensors["draft_vocab"] = torch.arange(1, 101, 5)
    save_module(tmp_path / "module", config, tensors)
    module = open_module(tmp_path / "module", base)
    assert module.config == config
    assert module.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        saved = tensor if name == "draft_vocab" else tensor.bfloat16()
        assert torch.equal(module.tensors[name].raw_rows(0, len(tensor)), saved)


@pytest.mark.parametrize(
    ("dtype", "trained_dtype", "module_dtype", "formats"),
    [
        ("f32", "q4", None, {"f32"}),
        ("f32", "q4", "q4", {"f32", "q4_1", "q8_0"}),
        ("bf16", "q4", None, {"bf16", "q4_1", "q8_0"}),
        ("bf16", None, None, {"bf16", "q8_0"}),
        ("bf16", None, "bf16", {"bf16"}),
        ("q8", "bf16", None, {"q8_0", "bf16"}),
    ],
)
def test_module_dtype_not_given_is_what_the_module_was_trained_for(
    tmp_path, dtype, trained_dtype, module_dtype, formats
):
    base = write_base(tmp_path / "base")
    write_module(tmp_path / "module", base, draft_vocab_size=20)
    edit_json(module_dtype=trained_dtype)(tmp_path / "module")
    packed = pack_model(base, open_module(tmp_path / "module", base), dtype, module_dtype)
    assert set(packed.formats.split(", ")) == formats


def test_a_module_of_another_base_is_refused_by_naming_both(tmp_path):
    base = write_base(tmp_path / "trained-for")
    other = write_base(tmp_path / "given", seed=1)
    write_module(tmp_path / "module", base)
    named = [f"for {b.config.name} (fingerprint {b.fingerprint[:12]})" for b in (base, other)]
    assert_refused(lambda: open_module(tmp_path / "module", other), tmp_path / "module", *named)


@pytest.mark.parametrize(
    ("change", "name", "reason"),
    [
        (shutil.rmtree, "", "no such directory"),
        (remove("config.json"), "config.json", "No such file"),
        (edit_json(model_type="llama"), "config.json", "\"model_type\" is 'llama'"),
        (edit_json(colour="red"), "config.json", "unknown key 'colour'"),
        (edit_json(head_dim=None), "config.json", "key 'head_dim' is missing"),
        (edit_json(head_dim="16"), "config.json", "head_dim is '16'; it must be int"),
        (edit_json(embed_norm=1), "config.json", "embed_norm is 1; it must be bool"),
        (
            edit_json(module_dtype="q5"),
            "config.json",
            "module_dtype is 'q5'; it must be one of f32, bf16",
        ),
        (edit_json(rope_scaling={"factor": 8.0}), "config.json", "rope_scaling: "),
        (edit_json(rope_scaling=BAD_SCALING), "config.json", "rope_scaling: factor is '8'"),
        (edit_json(vocab_size=100), "config.json", "vocab_size is 100; the base model's is 101"),
        (edit_json(num_hidden_layers=10**9), "config.json", "1000000000 layers"),
        (remove(MODULE_WEIGHTS), MODULE_WEIGHTS, "No such file"),
        (edit_bytes(MODULE_WEIGHTS, lambda data: data[:-2]), MODULE_WEIGHTS, "not a whole"),
        (edit_module("input_proj.weight", lambda _: None), MODULE_WEIGHTS, "is missing"),
        (edit_module("input_proj.weight", lambda t: t[:, :64]), MODULE_WEIGHTS, "shape [64, 64]"),
        (edit_module("embed_norm.weight", torch.Tensor.long), MODULE_WEIGHTS, "is i64; it must be"),
        (edit_module("draft_vocab", torch.Tensor.float), MODULE_WEIGHTS, "it must be i64"),
        (edit_module("draft_vocab", lambda t: t.flip(0)), MODULE_WEIGHTS, "ascending token ids"),
        (edit_module("draft_vocab", lambda t: t // 10), MODULE_WEIGHTS, "ascending token ids"),
        (edit_module("draft_vocab", lambda t: t + 101 - t[-1]), MODULE_WEIGHTS, "below 101"),
        (edit_json(draft_vocab_size=0), MODULE_WEIGHTS, "tensor draft_vocab has no place"),
    ],
)
def test_a_module_that_cannot_be_read_is_refused(tmp_path, change, name, reason):
    base, folder = write_base(tmp_path / "base"), tmp_path / "module"
    write_module(folder, base, draft_vocab_size=20)
    change(folder)
    assert_refused(lambda: open_module(folder, base), folder / name, reason)


def test_a_module_is_not_saved_in_place_of_a_file_or_with_wrong_tensors(tmp_path):
    module = write_module(tmp_path / "module", write_base(tmp_path / "base"))
    tensors, file = module.state_dict(), tmp_path / "file"
    file.touch()
    assert_refused(lambda: save_module(file, module.config, tensors), file, "cannot be saved")
    tensors["embed_norm.weight"] = torch.ones(9)
    with pytest.raises(RecycleError, match=r"tensor embed_norm.weight is \(9,\)"):
        save_module(tmp_path / "other", module.config, tensors)
    assert not (tmp_path / "other").exists()
