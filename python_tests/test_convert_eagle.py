"""python -m recycle_ext.convert --to eagle: the EAGLE-1 head computes what the module computes, or is refused."""

from __future__ import annotations

import json

import pytest
import torch
from heads import EAGLE, assert_equal, doubled, inputs, module_rows, run
from model_files import LLAMA3, WEIGHTS, edit_json
from models import reference_module, write_base, write_module
from safetensors.torch import load_file, save_file

from recycle_ext.checkpoint.config import RopeScaling
from recycle_ext.checkpoint.module import open_module


@pytest.mark.parametrize("n_layers", [1, 2])
@pytest.mark.parametrize("input_bias", [False, True])
def test_eagle_head_computes_the_module(tmp_path, input_bias, n_layers):
    base = write_base(tmp_path / "base", tied=False)
    module = write_module(tmp_path / "module", base, norms=False, input_bias=input_bias, n_layers=n_layers)
    assert run(module.path, "--base", base.path, "--output", tmp_path / "h", "--to", "eagle") == 0
    theirs = load_file(tmp_path / "h" / WEIGHTS)
    bias = theirs["fc.bias"]
    assert bool(bias.any()) == input_bias

    ours = {name: source.raw_rows(0, source.shape[0]) for name, source in module.tensors.items()}
    renamed = {name.replace("fc.", "input_proj."): tensor for name, tensor in theirs.items()}
    if not input_bias:
        del renamed["input_proj.bias"]
    assert renamed.keys() == ours.keys()
    assert all(torch.equal(renamed[name], tensor) for name, tensor in ours.items())

    if n_layers == 1:
        embedding, _, hidden = inputs(base)
        g, _ = EAGLE.rows(doubled(theirs), embedding, hidden, module.config)
        assert_equal(module_rows(reference_module(module), embedding, hidden)[0], g)

    assert run(tmp_path / "h", "--base", base.path, "--output", tmp_path / "again") == 0
    again = open_module(tmp_path / "again", base)
    assert all(torch.equal(again.tensors[name].to(), ours[name].float()) for name in ours)


def test_eagle_config_json_reads_as_llama(tmp_path):
    """transformers reads the sizes from which vLLM and SGLang build the draft model."""
    transformers = pytest.importorskip("transformers", reason="the extra `test` brings it")
    base = write_base(tmp_path / "base", context=300)
    folder = tmp_path / "module"
    write_module(folder, base, norms=False)
    fields = json.loads((folder / "config.json").read_text())
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_type"}
    (folder / "config.json").write_text(json.dumps(fields | {"rope_scaling": scaling}))
    run(folder, "--base", base.path, "--output", tmp_path / "head", "--to", "eagle")

    read = transformers.LlamaConfig.from_pretrained(tmp_path / "head")
    assert read.architectures == ["LlamaForCausalLMEagle", "LlamaForCausalLM"]
    assert (read.hidden_size, read.num_key_value_heads, read.head_dim) == (64, 2, 16)
    assert (read.num_hidden_layers, read.max_position_embeddings) == (1, 300)
    assert read.rope_parameters["factor"] == 8.0 and read.rope_parameters["rope_type"] == "llama3"
    assert run(tmp_path / "head", "--base", base.path, "--output", tmp_path / "again") == 0
    assert open_module(tmp_path / "again", base).config.rope_scaling == RopeScaling(**scaling)


def test_eagle_head_of_module_with_draft_vocabulary_or_bias_has_a_note(tmp_path, capsys):
    base = write_base(tmp_path / "base")
    write_module(tmp_path / "m", base, norms=False, input_bias=True, draft_vocab_size=20)
    assert run(tmp_path / "m", "--base", base.path, "--output", tmp_path / "h", "--to", "eagle") == 0
    said = capsys.readouterr().out
    assert "drafts from 20 tokens" in said and "vLLM 0.32 does not" in said
    assert "draft_vocab" not in load_file(tmp_path / "h" / WEIGHTS)


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("embed_norm", "a norm on the embedding (embed_norm)"),
        ("hidden_norm", "a norm on the hidden state (hidden_norm)"),
        ("output_norm", "a norm before the output head (output_norm)"),
        ("first_input_norm", "a norm before the first layer's attention (first_input_norm)"),
        ("zero_first_embedding", "(zero_first_embedding)"),
    ],
)
def test_module_that_eagle_cannot_hold_is_refused(tmp_path, flag, reason, capsys):
    base = write_base(tmp_path / "base")
    folder = tmp_path / "module"
    write_module(folder, base, norms=False)
    edit_json(**{flag: True})(folder)
    name = {"first_input_norm": "layers.0.input_layernorm"}.get(flag, flag)
    if flag != "zero_first_embedding":
        tensors = load_file(folder / "module.safetensors")
        tensors[f"{name}.weight"] = torch.ones(64)
        save_file(tensors, folder / "module.safetensors")
    assert run(folder, "--base", base.path, "--output", tmp_path / "h", "--to", "eagle") == 2
    error = capsys.readouterr().err
    assert reason in error and "--shape eagle" in error
    assert not (tmp_path / "h").exists()


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_module_with_attention_beyond_llamas_is_refused(tmp_path, architecture, capsys):
    base = write_base(tmp_path / "base", architecture)
    write_module(tmp_path / "m", base, norms=False)
    assert run(tmp_path / "m", "--base", base.path, "--output", tmp_path / "h", "--to", "eagle") == 2
    flag = {"qwen2": "qkv_bias", "qwen3": "qk_norm"}[architecture]
    assert f"({flag})" in capsys.readouterr().err
