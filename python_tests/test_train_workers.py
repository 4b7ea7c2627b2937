"""Training by two processes (gloo), started by torchrun: the same run as by one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_train import SMALL, config_file, joint, texts  # noqa: F401

from recycle_ext.train import __main__ as command

ARGUMENTS = [*SMALL, "--steps", "6", "--draft-vocab", "0", "--self-generate", "500", "--ema", "0"]


def by_two(arguments: list[str]) -> subprocess.CompletedProcess:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*run, "-m", "recycle_ext.train", *arguments], capture_output=True, text=True, timeout=300
    )


def weights(folder: Path):
    return load_file(folder / "module.safetensors")


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_two_processes_train_what_one_does(config_file, texts, tmp_path, kind):  # noqa: F811
    assert joint(config_file, texts, tmp_path / "out", "--steps", "20") == 0
    base = ["--base", str(tmp_path / "out" / "base"), *ARGUMENTS]
    shard = []
    if kind == "FSDP2":
        base += ["--text", str(texts), "--online"]
        shard = ["--shard-base"]
    assert command.main([*base, "--output", str(tmp_path / "one")]) == 0
    together = by_two([*base, "--output", str(tmp_path / "two"), *shard])
    assert together.returncode == 0, together.stderr
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in one.items():
        # The sum over processes is in another order, and the module is saved in bfloat16.
        apart = (value.float() - two[name].float()).abs().max()
        assert apart <= 2e-2 * value.float().abs().max(), name
    logs = [
        json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1])
        for name in ("one", "two")
    ]
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-2)
    assert logs[0]["acceptance_1"] == pytest.approx(logs[1]["acceptance_1"], abs=0.02)


def test_joint_training_by_two(config_file, texts, tmp_path):  # noqa: F811
    steps = ["--steps", "6", "--ema", "0"]
    assert joint(config_file, texts, tmp_path / "one", *steps) == 0
    arguments = ["--joint", str(config_file), "--text", str(texts)]
    output = ["--output", str(tmp_path / "two")]
    together = by_two([*arguments, *SMALL, "--lr", "5e-3", *steps, *output])
    assert together.returncode == 0, together.stderr
    logs = [
        json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1])
        for name in ("one", "two")
    ]
    assert logs[0]["held_out_loss"] == pytest.approx(logs[1]["held_out_loss"], rel=1e-2)


def test_a_mistake_is_told_once_by_each_process(tmp_path):
    failed = by_two(["--output", str(tmp_path / "out"), "--base", "nowhere.gguf"])
    assert failed.returncode != 0
    assert "error: nowhere.gguf: no such file" in failed.stderr
    assert 'File "' not in failed.stderr.split("error: nowhere.gguf")[0]
