"""The reference model against transformers, an independent implementation."""

from __future__ import annotations

import pytest
import torch
from models import write_base
from tolerance import error

from recycle_ext.checkpoint.config import RopeScaling, rope_inv_freq
from recycle_ext.reference.model import BaseModel, KvCache

transformers = pytest.importorskip("transformers", reason="the extra `test` brings it")

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def theirs(folder, dtype):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def ours(checkpoint, dtype) -> BaseModel:
    model = BaseModel(checkpoint.config)
    model.load_state_dict(checkpoint.state_dict())
    return model.to(dtype).eval()


@torch.no_grad()
def run_theirs(model, tokens):
    out = model(tokens, output_hidden_states=True)
    return out.hidden_states[-1], out.logits


@torch.no_grad()
def run_ours(model, tokens):
    hidden = model(tokens)
    return hidden, model.logits(hidden)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"tied": False, "n_heads": 6, "n_kv_heads": 3, "head_dim": 48, "hidden_size": 96},
        {"vocab_size": 77, "n_layers": 3, "n_heads": 5, "n_kv_heads": 1, "hidden_size": 80},
    ],
)
def test_hidden_states_and_logits_equal_transformers(tmp_path, architecture, sizes):
    checkpoint = write_base(tmp_path, architecture, **sizes)
    vocab = checkpoint.config.vocab_size
    tokens = torch.randint(0, vocab, (2, 50), generator=torch.Generator().manual_seed(0))
    exact = run_theirs(theirs(tmp_path, torch.float64), tokens)
    native = run_theirs(theirs(tmp_path, torch.float32), tokens)
    given = run_ours(ours(checkpoint, torch.float32), tokens)
    for mine, their, truth in zip(given, native, exact, strict=True):
        assert error(mine, truth) <= 2 * error(their, truth) + 1e-6 * truth.abs().max().item()


def test_rope_scaling_of_llama_3_equals_transformers():
    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=2, head_dim=32, rope_parameters={"rope_theta": 5e5, **LLAMA3}
    )
    rope = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    scaling = RopeScaling(8.0, 1.0, 4.0, 64)
    assert torch.equal(rope_inv_freq(32, 5e5, scaling), rope.inv_freq)


@torch.no_grad()
def test_model_with_cache_equals_model_without(tmp_path):
    model = ours(write_base(tmp_path, "qwen3"), torch.float64)
    tokens = torch.randint(0, 101, (2, 80), generator=torch.Generator().manual_seed(0))
    cache, parts = KvCache(), []
    for part in tokens.split([1, 70, 3, 1, 5], dim=1):
        parts.append(model(part, cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=0, atol=1e-12)


@torch.no_grad()
def test_truncated_cache_continues_like_a_new_one(tmp_path):
    model = ours(write_base(tmp_path), torch.float64)
    tokens = torch.randint(0, 101, (1, 30), generator=torch.Generator().manual_seed(0))
    cache = KvCache()
    model(torch.cat((tokens[:, :20], tokens[:, :10]), dim=1), cache)
    cache.truncate(20)
    tail = model(tokens[:, 20:], cache)
    torch.testing.assert_close(tail, model(tokens)[:, 20:], rtol=0, atol=1e-12)
