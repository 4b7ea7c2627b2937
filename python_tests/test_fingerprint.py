"""A base model's fingerprint: the same in every format, another with another norm weight."""

from __future__ import annotations

import pytest
import torch
from model_files import edit_tensor, write_gguf
from models import ARCHITECTURES, write_base

from recycle_ext.checkpoint.base_model import open_checkpoint


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q4_0", "Q5_0"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fingerprint_in_every_format_is_the_same(tmp_path, architecture, kind):
    hf = write_base(tmp_path / "hf", architecture)
    write_gguf(tmp_path / "model.gguf", hf, kind)
    assert open_checkpoint(tmp_path / "model.gguf").fingerprint == hf.fingerprint


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.q_norm.weight"])
def test_fingerprint_with_one_changed_norm_weight_differs(tmp_path, name):
    hf = write_base(tmp_path / "hf", "qwen3")
    before = hf.fingerprint
    edit_tensor(name, lambda t: t + 1e-6 * torch.eye(len(t))[3])(tmp_path / "hf")
    write_gguf(tmp_path / "model.gguf", hf, "Q8_0")
    after = open_checkpoint(tmp_path / "hf").fingerprint
    assert after != before
    assert open_checkpoint(tmp_path / "model.gguf").fingerprint == after
