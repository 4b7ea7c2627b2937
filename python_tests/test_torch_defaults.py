"""torch's default dtype and device, which a program around this package may have set, change no token and no weight."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import write_base, write_byte_tokenizer, write_module
from train_model import SMALL, write_joint_config, write_text

import recycle_ext
from recycle_ext.checkpoint.config import DTYPES
from recycle_ext.train import __main__ as train

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


def trained_weights(folder: Path, output: Path) -> dict[str, bytes]:
    """The weights of a joint run, and of runs for its base on the folder's text and on the base's own."""
    steps, text = [*SMALL, "--steps", "2"], ["--text", str(folder / "text.txt")]
    frozen = ["--base", str(output / "joint" / "base"), "--draft-vocab", "100", *steps]
    runs = {
        "joint": ["--joint", str(folder / "tiny.json"), *text, *steps],
        "text": [*frozen, *text],
        "own": [*frozen, "--self-generate", "500"],
    }
    for name, arguments in runs.items():
        assert train.main([*arguments, "--output", str(output / name)]) == 0
    return {str(file.relative_to(output)): file.read_bytes() for file in output.rglob("*.safetensors")}


def test_training_with_other_torch_defaults_gives_the_same_weights(tmp_path, other_defaults):
    write_text(tmp_path)
    write_joint_config(tmp_path)
    expected = trained_weights(tmp_path, tmp_path / "first")
    other_defaults()
    assert trained_weights(tmp_path, tmp_path / "second") == expected
    assert torch.get_default_dtype() != torch.float32
    assert torch.get_default_device().type == "meta"
