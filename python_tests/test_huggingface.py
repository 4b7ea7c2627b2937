"""Base models in Hugging Face directories: tensors and config equal the saved ones, damaged directories are refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from model_files import (
    INDEX,
    LLAMA3,
    SHARDS,
    WEIGHTS,
    assert_refused,
    edit_bytes,
    edit_json,
    edit_tensor,
    in_turn,
    remove,
    shard,
)
from models import ARCHITECTURES, write_base
from safetensors.torch import load_file, save_file

from recycle_ext.checkpoint.base_model import open_checkpoint

FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
Q_PROJ, UP_PROJ = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"
Q_BIAS, NORM = "model.layers.0.self_attn.q_proj.bias", "model.norm.weight"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_directory_tensors_equal_saved(tmp_path, architecture, tied, dtype):
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


def test_shards_read_as_one_model(tmp_path):
    whole = write_base(tmp_path).state_dict()
    shard(tmp_path)
    parts = open_checkpoint(tmp_path)
    assert {source.file.name for source in parts.tensors.values()} == set(SHARDS)
    assert parts.tensors.keys() == whole.keys()
    assert all(torch.equal(parts.tensors[name].to(), tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("scaling", [{}, LLAMA3])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rope_frequencies_equal_transformers(tmp_path, key, scaling, theta):
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


def test_null_in_config_json_reads_as_absent(tmp_path):
    config = write_base(tmp_path).config
    keys = ("head_dim", "rope_scaling", "rope_parameters", "quantization_config")
    values = json.loads((tmp_path / "config.json").read_text()) | dict.fromkeys(keys)
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert open_checkpoint(tmp_path).config == config


def test_byte_order_mark_is_no_part_of_config_json(tmp_path):
    config = write_base(tmp_path).config
    edit_bytes("config.json", lambda data: b"\xef\xbb\xbf" + data)(tmp_path)
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
def test_eos_ids_of_directory_come_from_both_configs(tmp_path, config, generation_config, expected):
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
        (edit_json(architectures=["MistralForCausalLM"]), "config.json", "\"model_type\" is 'llama'"),
        (edit_json(architectures=None, model_type="gpt2"), "config.json", "\"model_type\" is 'gpt2'"),
        (edit_json(architectures=None, model_type=None), "config.json", '"model_type" is None'),
        (edit_json(model_type=["llama"]), "config.json", "\"model_type\" is ['llama'], not str"),
        (
            edit_bytes("config.json", lambda data: data.replace(b"1e-05", b"null")),
            "config.json",
            '"rms_norm_eps" is null',
        ),
        (edit_json(vocab_size=None), WEIGHTS, "the sizes of the model ask for [32000, 64]"),
        (edit_json(hidden_act="gelu"), "config.json", "\"hidden_act\" is 'gelu'"),
        (edit_json(transformers_weights="other.safetensors"), "config.json", '"transformers_weights" is'),
        (edit_json(rope_parameters={"full_attention": {"rope_theta": 5.0}}), "config.json", "the same for all kinds"),
        (edit_json(layer_types=["sliding_attention"] * 2), "config.json", '"layer_types" is'),
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
        (edit_json(architectures=None, model_type="qwen2"), "", f"tensor {Q_BIAS} is missing"),
        (edit_tensor(Q_BIAS, lambda _: torch.ones(64)), WEIGHTS, f"tensor {Q_BIAS} has no place"),
    ],
)
def test_damaged_directory_is_refused(tmp_path, change, name, reason):
    write_base(tmp_path)
    change(tmp_path)
    assert_refused(lambda: open_checkpoint(tmp_path), tmp_path / name, reason)
