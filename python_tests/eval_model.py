"""A tiny model with a module, prompts and cloze items, for the tests of python -m recycle_ext.eval."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from models import write_base, write_byte_tokenizer, write_module

PROMPTS = [
    {"prompt": "the sea was", "category": "sea"},
    {"prompt": "a request", "category": "land", "chat": True},
    {"prompt": "waves and more waves", "category": "sea"},
    {"prompt": "x", "category": "land"},
]
CLOZE = [
    {"source": "a test"},
    {"context": "over the hills", "continuation": " and"},
    {"context": "one", "continuation": "  two"},
    {"context": "this one is left out, its continuation being one token", "continuation": "!"},
]
NEW_TOKENS = 24


def write_model(folder: Path) -> Path:
    """A tiny base model with a tokenizer of single bytes; beside it ``module``, a prompt file and a cloze file."""
    base = write_base(folder, vocab_size=write_byte_tokenizer(folder), n_layers=1)
    write_module(folder.parent / "module", base, like_base=True)
    for name, lines in (("prompts.jsonl", PROMPTS), ("cloze.jsonl", CLOZE)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder.parent / name).write_text(text)
    return folder


def options_for(model: Path) -> list[str]:
    folder = model.parent
    options = ["--model", model, "--module", folder / "module", "--prompts", folder / "prompts.jsonl"]
    options += ["--cloze", folder / "cloze.jsonl", "--max-new-tokens", NEW_TOKENS, "--threads", 1]
    return [*map(str, options), "--dtype", "f32"]


@functools.cache
def model_of_transformers(model: Path):
    transformers = pytest.importorskip("transformers", reason="the extra `test` brings it")
    return transformers.LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


@torch.no_grad()
def likelihoods_of_transformers(model: Path, prompt: list[int], text: list[int]):
    """Log-likelihoods and argmax tokens, from transformers with the same weights."""
    logits = model_of_transformers(model)(torch.tensor([[*prompt, *text]])).logits[0, len(prompt) - 1 : -1]
    rows = torch.arange(len(text))
    return logits.log_softmax(-1)[rows, torch.tensor(text)], logits.argmax(-1)
