"""torch's default dtype and device, which a program around this package may have set, change no token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import write_base, write_byte_tokenizer, write_module

import recycle_ext
from recycle_ext.checkpoint.config import DTYPES

OPTIONS = ({}, {"temperature": 0.9, "drafts": 2}, {"mode": "standard"}, {"mode": "alternate"}, {"drafts": "auto"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    vocab_size = write_byte_tokenizer(folder / "base")
    base = write_base(folder / "base", vocab_size=vocab_size)
    write_module(folder / "module", base, like_base=True, draft_vocab_size=100)
    return folder


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def other_defaults(request) -> Iterator[None]:
    """Another dtype, and a device on which a tensor has no values."""
    yield lambda: (torch.set_default_dtype(request.param), torch.set_default_device("meta"))
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def token_ids(folder: Path, dtype: str) -> list[list[int]]:
    model = recycle_ext.load(folder / "base", module=folder / "module", dtype=dtype)
    generations = [recycle_ext.generate(model, "the sea", seed=3, max_new_tokens=20, **options) for options in OPTIONS]
    for generation in generations:
        list(generation)
    return [generation.token_ids for generation in generations]


@pytest.mark.parametrize("dtype", DTYPES)
def test_generation_with_other_torch_defaults_gives_the_same_tokens(folder, other_defaults, dtype):
    expected = token_ids(folder, dtype)
    other_defaults()
    assert token_ids(folder, dtype) == expected
