"""Damage that the fuzzer found (python_tests/fuzz), each a case of its own."""

from __future__ import annotations

import json

import numpy as np
import pytest
from model_files import LLAMA3, edit_json, write_gguf
from models import write_base, write_byte_tokenizer, write_module

from recycle_ext.checkpoint.base_model import open_checkpoint
from recycle_ext.checkpoint.module import open_module
from recycle_ext.errors import RecycleError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "\\ud83d"}', "config.json: not JSON: 'utf-8' codec can't encode"),
        ("[" * 100_000, "config.json: not JSON: maximum recursion depth"),
    ],
)
def test_json_that_is_no_text_or_too_deep_is_refused(tmp_path, text, message):
    write_base(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RecycleError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rms_norm_eps", 1e40),
        ("rms_norm_eps", -1e-5),
        ("rms_norm_eps", 10**400),
        ("rope_theta", 1e40),
        ("rope_theta", 10**400),
    ],
)
def test_number_that_float32_cannot_hold_is_refused(tmp_path, key, value):
    write_base(tmp_path)
    edit_json(**{key: value})(tmp_path)
    with pytest.raises(RecycleError, match=f"config.json: {key} is .*float32|{tmp_path}: {key} is .*float32"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("length", [10**40, float("inf"), float("nan")])
def test_length_of_rope_scaling_that_float32_cannot_hold_is_refused(tmp_path, length):
    write_base(tmp_path)
    edit_json(rope_scaling=LLAMA3 | {"original_max_position_embeddings": length})(tmp_path)
    with pytest.raises(RecycleError, match=r"original_max_position_embeddings is .*float32"):
        open_checkpoint(tmp_path)


def test_half_a_character_in_a_tokenizer_config_is_refused(tmp_path):
    base = write_base(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "\\udc80"}')
    with pytest.raises(RecycleError, match=r"tokenizer_config\.json: not JSON"):
        _ = base.tokenizer


def test_gguf_tokenizer_named_by_an_array_is_refused(tmp_path):
    base = write_base(tmp_path)
    writes_array = {"tokenizer.ggml.model": np.array([1, 2]).tolist(), "tokenizer.ggml.eos_token_id": 2}
    write_gguf(tmp_path / "model.gguf", base, metadata=writes_array)
    with pytest.raises(RecycleError, match=r"tokenizer\.ggml\.model is 'an array of 2', not str"):
        _ = open_checkpoint(tmp_path / "model.gguf").tokenizer


def test_chat_template_that_is_not_utf8_is_refused(tmp_path):
    vocab_size = write_byte_tokenizer(tmp_path)
    base = write_base(tmp_path, vocab_size=vocab_size)
    (tmp_path / "chat_template.jinja").write_bytes("{{ 'é' }}".encode("latin-1"))
    with pytest.raises(RecycleError, match=r"chat_template\.jinja: not UTF-8: invalid continuation byte, byte 4"):
        _ = base.tokenizer


def test_large_integer_in_a_module_s_config_is_the_number(tmp_path):
    base = write_base(tmp_path / "base")
    write_module(tmp_path / "module", base)
    edit_json(rope_theta=10**30, rms_norm_eps=10**30)(tmp_path / "module")
    config = open_module(tmp_path / "module", base).config
    assert (config.rope_theta, config.rms_norm_eps) == (1e30, 1e30)
    assert config.inv_freq().isfinite().all()
