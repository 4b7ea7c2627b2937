"""python -m recycle_ext.train refuses what cannot be trained in one line that names option, limit and remedy."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from train_model import train_joint, write_small_base

from recycle_ext import train as package
from recycle_ext.train import __main__ as command
from recycle_ext.train.options import parse_arguments, train_options
from recycle_ext.train.trainer import Trainer, TrainOptions


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_small_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps is 0; it must be at least 1"),
        (["--lr", "-1"], "--lr is -1.0; it must be positive"),
        (["--lr", "nan"], "--lr is nan; it must be positive"),
        (["--held-out", "1"], "--held-out is 1.0"),
        (["--chain", "5"], "--chain is 5; it must be 1 to 4"),
        (["--ema", "1"], "--ema is 1.0; it must be in [0, 1)"),
        (["--length", "1000"], "--length is 1000; the base's context is 512"),
        (["--draft-vocab", "1000"], "--draft-vocab is 1000; the base's vocabulary has 40"),
        (["--resume"], "training.pt"),
        (["--base", "nowhere.gguf"], "nowhere.gguf: no such file"),
        (["--joint", "c.json"], "--joint needs --text"),
        (["--shard-base"], "--shard-base needs --online"),
        (["--device", "cuda"], "--device is cuda; this torch sees no NVIDIA GPU"),
    ],
)
def test_wrong_option_is_refused_in_one_line(base, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # for --device cuda, on any machine
    output = str(tmp_path / "out")
    status = command.main(["--base", base.path, "--output", output, *arguments])
    assert status == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not os.path.exists(os.path.join(output, "module.safetensors"))


def test_base_without_tokenizer_is_refused(base, tmp_path, capsys):
    arguments = ["--base", base.path, "--output", str(tmp_path / "out"), "--draft-vocab", "0"]
    assert command.main(arguments) == 2
    assert "tokenizer.json: missing" in capsys.readouterr().err


def test_batch_that_does_not_divide_is_refused(tmp_path, capsys):
    assert train_joint(tmp_path, tmp_path / "out", "--accumulate", "3") == 2
    assert "--batch-sequences is 8; it must be a multiple of --accumulate" in capsys.readouterr().err


def test_out_of_memory_names_the_options_that_help(tmp_path, capsys, monkeypatch):
    def no_memory(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte")

    monkeypatch.setattr(Trainer, "train_step", no_memory)
    assert train_joint(tmp_path, tmp_path / "out", "--steps", "2") == 2
    error = capsys.readouterr().err
    assert "error: out of memory; a larger --accumulate, a smaller --batch-sequences" in error


def test_every_train_option_has_a_flag_with_its_default():
    given = parse_arguments(["--output", "x"])
    renamed = {"learning_rate": "lr", "warmup_steps": "warmup"}
    for field in dataclasses.fields(TrainOptions):
        assert vars(given)[renamed.get(field.name, field.name)] == field.default
    assert train_options(given) == TrainOptions()
    assert package.__doc__
