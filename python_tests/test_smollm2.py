"""The default model, SmolLM2-135M-Instruct: against transformers, and in all modes."""

from __future__ import annotations

import pytest
import torch

import recycle_ext
from recycle_ext.checkpoint.base_model import open_checkpoint
from recycle_ext.reference.model import BaseModel

PROMPTS = [
    "Once upon a time, in a small village by the sea,",
    "The capital of France is",
    "def fibonacci(n):\n",
    "Q: What is the boiling point of water?\nA:",
    "<|im_start|>user\nWrite a haiku about rain.<|im_end|>\n<|im_start|>assistant\n",
    "In 1969, the first humans",
    "The three most important rules of writing are",
    "Ingredients: flour, sugar, two eggs",
    "Dear Sir or Madam, I am writing to",
    "import numpy as np\n\nx = np.",
]
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def checkpoint(default_model):
    return open_checkpoint(default_model)


@pytest.fixture(scope="module")
def theirs(default_model):
    transformers = pytest.importorskip("transformers", reason="the extra `test` brings it")
    # An independent reader of the same file: transformers dequantizes and reorders q and k by itself.
    return transformers.AutoModelForCausalLM.from_pretrained(
        default_model.parent, gguf_file=default_model.name, dtype=torch.float32
    ).eval()


def ids_of(model, prompt, **options) -> list[int]:
    generation = recycle_ext.generate(model, prompt, max_new_tokens=NEW_TOKENS, **options)
    for _ in generation:
        pass
    return generation.token_ids


@torch.no_grad()
def test_reference_model_equals_transformers(checkpoint, theirs):
    tokens = torch.tensor([checkpoint.tokenizer.encode(PROMPTS[0] + PROMPTS[3])])
    model = BaseModel(checkpoint.config)
    model.load_state_dict(checkpoint.state_dict())
    hidden = model.eval()(tokens)
    expected = theirs(tokens, output_hidden_states=True)
    scale = expected.logits.abs().max().item()
    assert (hidden - expected.hidden_states[-1]).abs().max() < 1e-5 * scale
    assert (model.logits(hidden) - expected.logits).abs().max() < 1e-5 * scale


@torch.no_grad()
def test_standard_f32_equals_transformers(default_model, theirs):
    """Equal tokens; the first different one is excused only where transformers' two largest logits are a tie."""
    model = recycle_ext.load(default_model, dtype="f32")
    ends = list(model.tokenizer.eos_token_ids)
    for prompt in PROMPTS:
        start = model.tokenizer.encode(prompt)
        ours = ids_of(model, start, mode="standard")
        expected = theirs.generate(
            torch.tensor([start]), do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=ends
        )[0, len(start) :].tolist()
        if expected[-1] in ends:
            expected.pop()
        if ours == expected:
            continue
        common = next(
            (i for i, (a, b) in enumerate(zip(ours, expected, strict=False)) if a != b), min(len(ours), len(expected))
        )
        logits = theirs(torch.tensor([start + expected[:common]])).logits[0, -1]
        (best, second), candidates = (part.tolist() for part in logits.topk(2))
        assert best - second < 1e-3, (prompt, common, best - second)
        assert set([ours[common]] if common < len(ours) else ends) & set(candidates)


@pytest.mark.parametrize("dtype", [None, "bf16", "q8"])
def test_verify_of_the_default_model_equals_standard(default_model, dtype):
    model = recycle_ext.load(default_model, dtype=dtype)
    accepted = steps = 0
    for prompt in PROMPTS:
        expected = ids_of(model, prompt, mode="standard")
        for drafts in (1, 3):
            generation = recycle_ext.generate(model, prompt, mode="verify", drafts=drafts, max_new_tokens=NEW_TOKENS)
            for _ in generation:
                pass
            assert generation.token_ids == expected
            accepted += generation.statistics.accepted_drafts
            steps += generation.statistics.steps
    # The shipped module is used: without it no draft token is accepted.
    assert accepted > 0.2 * steps


def test_streamed_pieces_add_up_to_the_decoded_text(default_model):
    model = recycle_ext.load(default_model)
    generation = recycle_ext.generate(model, "Emoji: 🙂🙃 and 漢字:", max_new_tokens=30)
    pieces = list(generation)
    assert len(pieces) > 5
    assert "".join(pieces) == generation.text == model.tokenizer.decode(generation.token_ids)
    assert generation.statistics.new_tokens == len(generation.token_ids) <= 30


def test_generation_stops_at_the_end_token(default_model):
    model = recycle_ext.load(default_model)
    generation = recycle_ext.generate(model, "Say hi.", chat=True, max_new_tokens=400)
    text = "".join(generation)
    assert 0 < generation.statistics.new_tokens < 400
    assert "<|im_end|>" not in text
