"""python -m recycle_ext.convert refuses heads that no module can compute, and wrong arguments, with the reason."""

from __future__ import annotations

import shutil

import pytest
import torch
from heads import DEEPSEEK, DEEPSEEK_LAYER, EAGLE, MIMO, QWEN, run, write_head
from model_files import WEIGHTS, edit_json, edit_tensor
from models import write_base, write_module

from recycle_ext import convert
from recycle_ext.checkpoint.base_model import open_checkpoint
from recycle_ext.convert.source import Source
from recycle_ext.errors import RecycleError


def put(name, shape=(4, 4)):
    """Adds a tensor of ones."""
    return edit_tensor(name, lambda _: torch.ones(shape))


Q_PROJ = "mtp.layers.0.self_attn.q_proj.weight"
EXPERTS = f"{DEEPSEEK_LAYER}mlp.experts.0.up_proj.weight"
MLA = f"{DEEPSEEK_LAYER}self_attn.kv_a_proj_with_mqa.weight"
REFUSED = [
    (EAGLE, put("midlayer.mlp.up_proj.weight"), "an EAGLE-3 head"),
    (EAGLE, put("d2t"), "an EAGLE-3 head"),
    (EAGLE, edit_tensor("fc.weight", lambda _: None), "no head of a known format"),
    (EAGLE, edit_tensor("fc.weight", lambda t: t[:, :64]), "fc.weight has shape [64, 64]"),
    (EAGLE, put("embed_tokens.weight"), "embed_tokens.weight has shape [4, 4]"),
    (EAGLE, put("lm_head.weight", shape=(101, 64)), "lm_head.weight is the head's own: it differs"),
    (EAGLE, put("layers.0.input_layernorm.weight", shape=64), "has no place in a module"),
    (EAGLE, put("layers.0.self_attn.o_proj.bias", shape=64), "has no place in a module"),
    (EAGLE, edit_json(num_hidden_layers=2), "tensor layers.1.input_layernorm.weight is missing"),
    (EAGLE, edit_json(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    (EAGLE, edit_json(hidden_act="gelu"), "\"hidden_act\" is 'gelu'"),
    (EAGLE, edit_json(vocab_size=100), "vocab_size is 100; base has 101"),
    (EAGLE, edit_json(num_key_value_heads=3), "4 heads cannot share 3"),
    (EAGLE, edit_json(rope_scaling={"type": "linear"}), "\"rope_scaling\" is 'linear'"),
    (EAGLE, lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"), "weights_only=True"),
    (EAGLE, lambda f: (f / WEIGHTS).write_bytes(b"PK\3\4"), "not a whole safetensors file"),
    (EAGLE, lambda f: (f / "config.json").unlink(), "No such file"),
    (EAGLE, shutil.rmtree, "no such file or directory"),
    (MIMO, put("model.mtp_layers.1.input_proj.weight"), "several prediction layers"),
    (MIMO, put("model.mtp_layers.0.self_attn.sinks"), "attention sinks"),
    (DEEPSEEK, put(EXPERTS), "a mixture of experts"),
    (DEEPSEEK, put(MLA), "multi-head latent attention"),
    (DEEPSEEK, put("model.layers.3.eh_proj.weight"), "2 prediction layers"),
    (DEEPSEEK, put(f"{DEEPSEEK_LAYER}embed_tokens.weight", shape=(101, 64)), "embed_tokens.weight is the head's own"),
    (DEEPSEEK, edit_json(partial_rotary_factor=0.5), '"partial_rotary_factor" is 0.5'),
    (QWEN, edit_tensor(Q_PROJ, lambda t: torch.cat((t, t))), "the head's attention gates"),
    (QWEN, put("mtp.layers.1.mlp.up_proj.weight"), "several prediction layers"),
]


@pytest.mark.parametrize(("layout", "change", "reason"), REFUSED)
def test_head_that_no_module_computes_is_refused(tmp_path, layout, change, reason, capsys):
    base = write_base(tmp_path / "base", "qwen3" if layout is QWEN else "llama")
    write_head(tmp_path / "head", layout, base)
    change(tmp_path / "head")
    assert run(tmp_path / "head", "--base", base.path, "--output", tmp_path / "module") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert str(tmp_path / "head") in error and reason in error
    assert not (tmp_path / "module").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (edit_tensor("model.norm.weight", lambda t: t * (torch.arange(64) != 17)), "in dimension 17"),
        (edit_json(rms_norm_eps=1e-6), "rms_norm_eps is 1e-05, the base's 1e-06"),
    ],
)
def test_final_norm_that_cannot_be_undone_is_refused(tmp_path, change, reason):
    write_head(tmp_path / "head", DEEPSEEK, write_base(tmp_path / "base"))
    change(tmp_path / "base")
    base = open_checkpoint(tmp_path / "base")
    with pytest.raises(RecycleError, match=reason):
        convert.to_module(Source(tmp_path / "head"), base, before_norm=True)


def test_base_without_a_head_is_refused_with_the_formats(tmp_path, capsys):
    base = write_base(tmp_path / "base")
    assert run(base.path, "--base", base.path, "--output", tmp_path / "module") == 2
    assert "no head of a known format; the formats, each with a tensor that shows it," in capsys.readouterr().err


def test_wrong_arguments_are_refused(tmp_path, capsys):
    base = write_base(tmp_path / "base")
    write_module(tmp_path / "module", base, norms=False)
    write_head(tmp_path / "head", EAGLE, base)
    (tmp_path / "file").touch()

    def error(source, *more):
        assert run(tmp_path / source, "--base", base.path, *more) == 2
        return capsys.readouterr().err

    new = tmp_path / "new"
    assert "is a module already" in error("module", "--output", new)
    assert "starts from a module" in error("head", "--output", new, "--to", "eagle")
    assert "exists and is not empty" in error("head", "--output", tmp_path / "module")
    assert "exists and is not empty" in error("head", "--output", tmp_path / "file")
    before = ["--hidden-state", "before-norm"]
    assert "for heads that norm the state" in error("head", "--output", new, *before)
    assert not new.exists()
    new.mkdir()
    assert run(tmp_path / "head", "--base", base.path, "--output", new) == 0
