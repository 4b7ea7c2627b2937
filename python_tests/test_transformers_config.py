"""A Hugging Face directory is read as transformers reads it, or refused with the key that is not supported."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_files import INDEX, SHARDS, WEIGHTS
from models import random_tensors, reference_base
from safetensors.torch import load_file, save_file

from recycle_ext.checkpoint import huggingface
from recycle_ext.checkpoint.architectures import ARCHITECTURES
from recycle_ext.checkpoint.base_model import open_checkpoint
from recycle_ext.errors import RecycleError

transformers = pytest.importorskip("transformers", reason="the extra `test` brings it")

ABSENT = object()
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CLASSES = {row.model_types[0]: row.hf_classes[0] for row in ARCHITECTURES}
SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
}
TOKENS = torch.arange(24).mul(7).remainder(48)[None]
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
OLD_LLAMA3 = {"type": "llama3", **{key: value for key, value in LLAMA3.items() if key != "rope_type"}}
LENGTH = {"original_max_position_embeddings": 16}
ROPES = [
    *(None, {}, {"rope_type": "default"}, {"type": "default", "factor": 2.0}, {"rope_theta": 50.0}),
    *(LLAMA3, LLAMA3 | LENGTH, OLD_LLAMA3 | LENGTH, LLAMA3 | LENGTH | {"rope_theta": 300}),
    *({"rope_type": "linear", "factor": 2.0}, {"type": "dynamic", "factor": 2.0}, {"type": "yarn", "factor": 2.0}),
    *({"type": "llama3"}, {"full_attention": {"rope_type": "default", "rope_theta": 50.0}}, {"factor": 2.0}),
]
FULL, SLIDING = "full_attention", "sliding_attention"
VALUES = {
    "architectures": [None, [], ["LlamaForCausalLM"], ["Qwen2ForCausalLM"], ["LlamaForSequenceClassification"]],
    "hidden_act": ["silu", "swish", "gelu", None],
    "rms_norm_eps": [1e-6, 0.05, None],
    "rope_theta": [100.0, 500, None],
    "rope_scaling": ROPES,
    "rope_parameters": ROPES,
    "original_max_position_embeddings": [12],
    "partial_rotary_factor": [1.0, 0.5, None],
    "max_position_embeddings": [16, None],
    "num_key_value_heads": [1, 4, None],
    "head_dim": [16, None],
    "attention_bias": [False, True, None],
    "mlp_bias": [False, True, None],
    "sliding_window": [None, 6, 0, "6"],
    "use_sliding_window": [True, False, None],
    "max_window_layers": [0, 1, 2, None],
    "layer_types": [None, [FULL, FULL], [FULL, SLIDING], [SLIDING], ["linear_attention"] * 2],
    "tie_word_embeddings": [True, False, None],
    "torch_dtype": ["float16"],
    "dtype": ["bfloat16", None],
    "bos_token_id": [None, 3],
    "eos_token_id": [None, 3, [3, 5]],
    "quantization_config": [None],
    "intermediate_size": [],
    "per_layer_config": [None],
    "pretraining_tp": [2],
    "max_sequence_length": [8],
}
CHANGES = [(key, value) for key, values in VALUES.items() for value in [*values, ABSENT]]


def write(folder, model_type, changes):
    """Writes a small model's config and random weights; returns transformers' model, None where there is none."""
    named = {"model_type": model_type, "architectures": [CLASSES[model_type]]}
    values = SIZES | named | dict(changes)
    values = {key: value for key, value in values.items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(values))
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        model(TOKENS[:, :1])
    except Exception:  # of any type: what transformers can't build has no right value
        return None
    tensors = random_tensors({name: tuple(t.shape) for name, t in model.state_dict().items()}, seed=1)
    if config.tie_word_embeddings:
        tensors[HEAD] = tensors[EMBEDDING]
    model.load_state_dict(tensors)
    kept = {name: t for name, t in tensors.items() if not (config.tie_word_embeddings and name == HEAD)}
    save_file(kept, folder / WEIGHTS, {"format": "pt"})
    return model


def full_context(config):
    """Longest context in which each layer of transformers' model sees each position."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or [SLIDING]
    if config.model_type == "llama" or window is None or SLIDING not in kinds:
        return config.max_position_embeddings
    return min(config.max_position_embeddings, window)


def assert_same_logits(folder, theirs):
    base = open_checkpoint(folder)
    assert base.config.max_position_embeddings == full_context(theirs.config)
    tokens = TOKENS[:, : base.config.max_position_embeddings]
    ours = reference_base(base, torch.float32)
    torch.testing.assert_close(ours.logits(ours(tokens)), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", CLASSES)
def test_config_that_says_nothing_has_the_defaults_of_transformers(tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    ours = huggingface.read_config(tmp_path / "config.json", "name")
    window = theirs.sliding_window if model_type == "mistral" else None
    assert dataclasses.asdict(ours) | {"qkv_bias": None, "qk_norm": None} == {
        "architecture": model_type,
        "vocab_size": theirs.vocab_size,
        "hidden_size": theirs.hidden_size,
        "intermediate_size": theirs.intermediate_size,
        "n_layers": theirs.num_hidden_layers,
        "n_heads": theirs.num_attention_heads,
        "n_kv_heads": theirs.num_key_value_heads,
        "head_dim": getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads),
        "rms_norm_eps": theirs.rms_norm_eps,
        "rope_theta": theirs.rope_parameters["rope_theta"],
        "rope_scaling": None,
        "max_position_embeddings": window or theirs.max_position_embeddings,
        "tie_word_embeddings": theirs.tie_word_embeddings,
        "bos_token_id": None,
        "eos_token_ids": (),
        "name": "name",
        "rope_freq_factors": None,
        "qkv_bias": None,
        "qk_norm": None,
    }


READ = [
    ("llama", {"architectures": None}),
    ("qwen3", {"architectures": ABSENT}),
    ("llama", {"architectures": ["LLaMAForCausalLM"]}),
    ("llama", {"hidden_act": "swish"}),
    ("llama", {"hidden_act": ABSENT, "rms_norm_eps": ABSENT, "tie_word_embeddings": ABSENT, "head_dim": None}),
    ("llama", {"max_position_embeddings": ABSENT, "max_sequence_length": 2048}),
    ("llama", {"num_key_value_heads": ABSENT}),
    ("llama", {"sliding_window": 6, "use_sliding_window": True}),
    ("llama", {"rope_scaling": OLD_LLAMA3 | LENGTH}),
    ("llama", {"rope_scaling": LLAMA3}),
    ("llama", {"rope_scaling": LLAMA3 | LENGTH, **{"original_max_position_embeddings": 12}}),
    ("llama", {"rope_scaling": LLAMA3 | LENGTH, "rope_parameters": {"rope_theta": 50.0}}),
    ("llama", {"rope_scaling": LLAMA3 | LENGTH, "rope_parameters": {"rope_theta": 50.0}, "rope_theta": 300}),
    ("llama", {"rope_scaling": {}, "rope_parameters": {"rope_theta": 50.0}}),
    ("llama", {"rope_scaling": {"type": "default", "factor": 2.0}, "rope_theta": 300}),
    ("mistral", {"num_key_value_heads": ABSENT, "num_attention_heads": 8, "sliding_window": None}),
    ("mistral", {"sliding_window": 6, "use_sliding_window": False}),
    ("qwen2", {"num_key_value_heads": None, "head_dim": ABSENT}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": None}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 6}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    ("qwen3", {"use_sliding_window": True, "max_window_layers": 1}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 6, "layer_types": [FULL, FULL], "max_window_layers": 0}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 6, "layer_types": [FULL, SLIDING]}),
    ("qwen3", {"head_dim": 16, "torch_dtype": "float16"}),
]


@pytest.mark.parametrize(("model_type", "changes"), READ)
@torch.no_grad()
def test_config_of_older_versions_and_other_tools_runs_as_in_transformers(tmp_path, model_type, changes):
    theirs = write(tmp_path, model_type, changes)
    assert theirs is not None
    assert_same_logits(tmp_path, theirs)


@settings(max_examples=50)
@given(
    model_type=st.sampled_from(sorted(CLASSES)),
    changes=st.lists(st.sampled_from(CHANGES), min_size=3, max_size=8, unique_by=lambda change: change[0]),
)
@torch.no_grad()
def test_generated_config_runs_as_in_transformers_or_is_refused(model_type, changes):
    with tempfile.TemporaryDirectory() as folder:
        theirs = write(Path(folder), model_type, changes)
        try:
            open_checkpoint(folder)
        except RecycleError as error:
            assert theirs is None or any(f'"{key}"' in str(error) for key, _ in changes), error
            return
        if theirs is not None:
            assert_same_logits(folder, theirs)


@pytest.mark.parametrize("head", ["equal", "its own", "without an embedding", "of other precision"])
@torch.no_grad()
def test_head_of_tied_model_is_the_one_of_transformers(tmp_path, head):
    write(tmp_path, "llama", {"tie_word_embeddings": True})
    tensors = load_file(tmp_path / WEIGHTS)
    tensors[HEAD] = tensors[EMBEDDING].clone()
    if head == "its own":
        tensors[HEAD][-1, -1] += 1
    if head == "without an embedding":
        del tensors[EMBEDDING]
    if head == "of other precision":
        tensors[HEAD] = tensors[HEAD].bfloat16()
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same_logits(tmp_path, theirs)
    assert open_checkpoint(tmp_path).config.tie_word_embeddings == (head in ("equal", "without an embedding"))


@torch.no_grad()
def test_whole_file_counts_before_index_as_in_transformers(tmp_path):
    theirs = write(tmp_path, "llama", {})
    old = {name: tensor + 1 for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    save_file(old, tmp_path / SHARDS[0], {"format": "pt"})
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(old, SHARDS[0])}))
    assert_same_logits(tmp_path, theirs)
    assert_same_logits(tmp_path, transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))
