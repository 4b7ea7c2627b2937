"""Base models in GGUF files: tensors and config equal the stored ones, damaged files are refused."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GgmlType
from gguf.quants import quantize
from model_files import TEXTS, assert_refused, write_gguf
from models import write_base
from vocabularies import KEY, byte_level

from recycle_ext import load
from recycle_ext.checkpoint.base_model import open_checkpoint
from recycle_ext.errors import RecycleError

GGUF_ARCHITECTURES = ["llama", "qwen2", "qwen3"]
KEPT_TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
BAD_TOKENS = {"tokenizer.ggml.tokens": 3, "tokenizer.ggml.eos_token_id": None}
UP_PROJ, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"


@pytest.mark.parametrize("kind", KEPT_TYPES + ["MXFP4"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", GGUF_ARCHITECTURES)
def test_gguf_tensors_equal_stored(tmp_path, architecture, tied, kind):
    """llama's q and k rows are stored interleaved and read in Hugging Face's order; qwen's are stored in that order."""
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
@pytest.mark.parametrize("kind", ["BF16", "Q4_1", "MXFP4"])
@pytest.mark.parametrize("architecture", GGUF_ARCHITECTURES)
def test_gguf_rows_of_k_from_any_start_are_in_order(tmp_path, architecture, kind, rows):
    hf = write_base(tmp_path / "hf", architecture)
    name = "model.layers.1.self_attn.k_proj.weight"
    start, stop = rows
    values = write_gguf(tmp_path / "model.gguf", hf, kind)[name][start:stop]
    source = open_checkpoint(tmp_path / "model.gguf").tensors[name]
    assert np.array_equal(source.float_rows(start, stop).numpy(), values)
    raw = source.raw_rows(start, stop)
    if kind == "Q4_1":
        # A block lies within one row, so the order of rows does not change the blocks.
        blocks = quantize(hf.tensors[name].to().numpy(), GgmlType.Q4_1)
        assert np.array_equal(raw.numpy(), blocks[start:stop])
    else:
        assert raw.dtype == (torch.bfloat16 if kind == "BF16" else torch.float32)
        assert np.array_equal(raw.float().numpy(), values)


def test_gguf_config_equals_directory(tmp_path):
    hf = write_base(tmp_path / "hf", tied=False)
    write_gguf(tmp_path / "tiny.gguf", hf, metadata={"tokenizer.ggml.bos_token_id": 1})
    config = open_checkpoint(tmp_path / "tiny.gguf").config
    assert config.name == "tiny"
    assert config.rms_norm_eps == pytest.approx(hf.config.rms_norm_eps)
    same = {"name": "hf", "rms_norm_eps": hf.config.rms_norm_eps}
    assert dataclasses.replace(config, **same) == hf.config


def test_gguf_rope_freqs_divide_frequencies(tmp_path):
    hf = write_base(tmp_path / "hf")
    factors = np.linspace(1, 8, hf.config.head_dim // 2, dtype=np.float32)
    write_gguf(tmp_path / "model.gguf", hf, tensors={"rope_freqs.weight": factors})
    base = open_checkpoint(tmp_path / "model.gguf")
    assert base.config.rope_freq_factors == tuple(factors.tolist())
    assert torch.equal(base.config.inv_freq(), hf.config.inv_freq() / torch.from_numpy(factors))
    assert base.tensors.keys() == hf.tensors.keys()


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({"scaling.factor": 4.0}, 4.0),
        ({"scaling.factor": 4.0, "scaling.type": "linear"}, 4.0),
        ({"scale_linear": 2.0}, 2.0),
        ({"scaling.factor": 4.0, "scale_linear": 2.0}, 4.0),
        ({"scaling.factor": 4.0, "scaling.type": "none"}, 1.0),
        ({"scaling.factor": 0.0, "scaling.attn_factor": 1.0}, 1.0),
    ],
)
def test_gguf_linear_rope_scaling_divides_frequencies(tmp_path, keys, factor):
    """As in llama.cpp, scaling without a type is linear."""
    hf = write_base(tmp_path / "hf")
    keys = {f"llama.rope.{key}": value for key, value in keys.items()}
    factors = np.linspace(1, 8, hf.config.head_dim // 2, dtype=np.float32)
    for tensors, others in (({}, 1.0), ({"rope_freqs.weight": factors}, torch.from_numpy(factors))):
        write_gguf(tmp_path / "model.gguf", hf, metadata=keys, tensors=tensors)
        inv_freq = open_checkpoint(tmp_path / "model.gguf").config.inv_freq()
        assert torch.equal(inv_freq, hf.config.inv_freq() / (others * factor))


@pytest.mark.parametrize("name", ["model.gguf", "model.GGUF", "sha256-0a1b"])
def test_gguf_of_any_name_keeps_its_formats(tmp_path, name):
    """Ollama's files have no ending."""
    keys = byte_level()
    hf = write_base(tmp_path / "hf", vocab_size=len(keys["tokens"]))
    write_gguf(tmp_path / name, hf, "F32", metadata={KEY + key: value for key, value in keys.items()})
    model = load(tmp_path / name, module="none")
    assert model.packed.formats == "f32"
    assert model.cache_dtype == torch.float32


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
def test_gguf_eos_ids_come_from_metadata_and_vocabulary(tmp_path, metadata, expected):
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
        ({"metadata": {"llama.rope.scaling.attn_factor": 2.0}}, "attn_factor is 2.0; only 1"),
        ({"metadata": {"llama.rope.scaling.factor": -2.0}}, "scaling.factor is -2.0; it must be positive"),
        ({"metadata": {"split.count": 3, "split.no": 1}}, "part 2 of 3 of a split model; join the parts first"),
        (
            {
                "metadata": {"split.count": 3},
                "edit": lambda data: data.replace(b"general.architecture", b"general.architectura"),
            },
            "part 1 of 3 of a split model",
        ),
        ({"metadata": {"general.type": "adapter"}}, "a LoRA adapter, not a model; merge it into its base first"),
        ({"metadata": {"general.type": "mmproj"}}, "(mmproj); give the file of its language model"),
        ({"arch": "clip"}, "(mmproj); give the file of its language model"),
        ({"edit": lambda data: data[:4] + data[4:8][::-1] + data[8:]}, "a big-endian GGUF file; make it little-endian"),
        ({"metadata": {"llama.block_count": None}}, "llama.block_count is missing"),
        ({"metadata": {"llama.block_count": 2**31}}, "2147483648 layers"),
        ({"metadata": {"llama.attention.head_count": 0}}, "with 0 heads"),
        ({"metadata": {"llama.attention.head_count": [4, 4]}}, "is 'an array of 2', not int"),
        ({"metadata": {"llama.attention.value_length": 8}}, "value_length is 8; only 16"),
        ({"metadata": {"llama.rope.freq_base": 0.0}}, "rope_theta is 0.0"),
        ({"metadata": BAD_TOKENS}, "tokens is missing or no array of strings"),
        ({"tensors": {"token_embd.weight": None}}, "tensor token_embd.weight is missing"),
        ({"tensors": {"blk.1.ffn_up.weight": None}}, f"tensor {UP_PROJ} is missing"),
        ({"tensors": {"output_norm.weight": np.ones(63, "f")}}, f"{NORM} has shape [63]"),
        ({"tensors": {"output_norm.weight": np.ones(64)}}, "output_norm.weight has type F64"),
        ({"tensors": {"blk.0.ffn_gate_inp.weight": np.ones((4, 64), "f")}}, "has no place"),
        ({"tensors": {"rope_freqs.weight": np.ones(7, "f")}}, "rope_freqs.weight is f32 [7]"),
    ],
)
def test_damaged_gguf_is_refused(tmp_path, options, reason):
    file = tmp_path / "model.gguf"
    write_gguf(file, write_base(tmp_path / "hf"), **options)
    assert_refused(lambda: open_checkpoint(file), file, reason)


@pytest.mark.parametrize("damage", ["flipped", "cut"])
@pytest.mark.parametrize("kind", ["F32", "Q5_0"])
def test_randomly_damaged_gguf_opens_or_is_refused(tmp_path, kind, damage):
    """No exception but RecycleError, neither when the file is opened nor when its tensors are read."""
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
