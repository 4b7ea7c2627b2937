"""Module directories: a saved module opens bit-equal; damaged modules and modules of another base are refused."""

from __future__ import annotations

import dataclasses
import functools
import shutil

import pytest
import torch
from model_files import LLAMA3, assert_refused, edit_bytes, edit_json, edit_tensor, remove
from models import random_tensors, write_base, write_module

from recycle_ext.checkpoint.config import RopeScaling
from recycle_ext.checkpoint.module import open_module, save_module
from recycle_ext.checkpoint.shapes import module_shapes
from recycle_ext.errors import RecycleError
from recycle_ext.weights.pack import pack_model

MODULE_WEIGHTS = "module.safetensors"
MODULES = [{}, {"norms": False, "input_bias": True}, {"n_layers": 2, "draft_vocab_size": 20}]
BAD_SCALING = {key: "8" for key in LLAMA3 if key != "rope_type"}
edit_module = functools.partial(edit_tensor, file=MODULE_WEIGHTS)


@pytest.mark.parametrize("options", MODULES)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_module_saved_and_opened_is_bit_equal(tmp_path, architecture, options):
    base = write_base(tmp_path / "base", architecture)
    config = write_module(tmp_path / "module", base, **options).config
    config = dataclasses.replace(
        config, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192), zero_first_embedding=True, module_dtype="q4"
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
def test_module_dtype_not_given_is_the_trained_dtype(tmp_path, dtype, trained_dtype, module_dtype, formats):
    base = write_base(tmp_path / "base")
    write_module(tmp_path / "module", base, draft_vocab_size=20)
    edit_json(module_dtype=trained_dtype)(tmp_path / "module")
    packed = pack_model(base, open_module(tmp_path / "module", base), dtype, module_dtype)
    assert set(packed.formats.split(", ")) == formats


def test_module_of_another_base_is_refused(tmp_path):
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
        (edit_json(module_dtype="q5"), "config.json", "module_dtype is 'q5'; it must be one of f32, bf16"),
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
def test_damaged_module_is_refused(tmp_path, change, name, reason):
    base, folder = write_base(tmp_path / "base"), tmp_path / "module"
    write_module(folder, base, draft_vocab_size=20)
    change(folder)
    assert_refused(lambda: open_module(folder, base), folder / name, reason)


def test_save_module_over_a_file_or_with_wrong_tensors_is_refused(tmp_path):
    module = write_module(tmp_path / "module", write_base(tmp_path / "base"))
    tensors, file = module.state_dict(), tmp_path / "file"
    file.touch()
    assert_refused(lambda: save_module(file, module.config, tensors), file, "cannot be written")
    tensors["embed_norm.weight"] = torch.ones(9)
    with pytest.raises(RecycleError, match=r"tensor embed_norm.weight is \(9,\)"):
        save_module(tmp_path / "other", module.config, tensors)
    assert not (tmp_path / "other").exists()
